"""Labelled texts by name: the known datasets, any other of the hub, the user's own files, the docstring tasks.

    python -m utils.data.load                                   # table of the known datasets, without network
    python cache.py --dataset_name emotion                      # a key of the table, or its hub id
    python cache.py --dataset_name user/dataset:config          # any other dataset of the hub
    python cache.py --dataset_name reviews.csv --text_column review --label_column stars
    python cache.py --dataset_name folder:subset                # a folder whose README.md names subsets
    python cache.py --dataset_name docstrings/raises            # see utils/data/docstrings.py

Data without a held-out split is split 70/30. A user's own rows that are empty or cannot be encoded are errors; the user
cannot mend a dataset of the hub, whose rows of this kind are left out with a warning. `files.py` says which files are
read, `cells.py` which labels count as missing and which cells are text. Nothing of the hub is ever executed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.data.cells import (
    check_words,
    class_values,
    is_missing,
    is_number,
    is_whole,
    label_cells,
    listed,
    render_column,
    target_cells,
    told_missing,
    typed,
)
from utils.data.files import VALIDATION_NAMES, Table, check_class_names
from utils.data.sources import Source, find_source, join_texts, label_column_name, read_column, text_pieces
from utils.data.splits import (
    grouped_split,
    leaked_share,
    linked_groups,
    paper_split,
    seeded_split,
    split_like,
    stratified_rows,
)
from utils.data.table import table
from utils.script import UserError, run_script, warn
from utils.settings import Data, Run

LEAK_WARNING = 0.01  # share of test texts that are also in train from which on a plain warning is due
MAX_MEAN = 1e5  # of targets, in their standard deviations: its square costs 10 of the 16 digits of float64
SPREADS = (1e-15, 1e15)  # of targets: standard deviations whose powers float64 and float32 hold
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
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of classes c; 1 for regression."""
        return len(self.label_names) or 1


@dataclass(frozen=True)
class Rows:
    """Texts with a label each; a text without any content is the empty string."""

    texts: list[str]
    labels: list[Any]
    groups: np.ndarray | None = None  # (n,) rows of one group stay on one side of a split

    def take(self, rows: Iterable[int]) -> "Rows":
        rows = list(rows)
        groups = None if self.groups is None else self.groups[rows]
        return Rows([self.texts[row] for row in rows], [self.labels[row] for row in rows], groups)


# ------------------------------------------------------------------ rows
def _is_regression(settings: Data, source: Source, labels: list[Any]) -> bool:
    """`task` decides; under `auto` the table of datasets, else any number that is not a whole one."""
    if settings.task != "auto":
        return settings.task == "regression"
    if source.spec and not settings.label_column:
        return source.spec.num_classes == 0
    present = [label for label in labels if not is_missing(label, True)]
    return all(map(is_number, present)) and any(not is_whole(label) for label in present)


def _has_labels(rows: Table, label: str) -> bool:
    """Whether any row has a label; those of a test split may be hidden."""
    return not all(map(is_missing, typed(list(rows.columns.get(label, ())[:]))))


def choose_parts(source: Source, label: str, split: str, divide_train: bool = False) -> dict[str, Table]:
    """The tables that serve as `train` and as `test`, which may be missing; for `all` every one with labels.

    With `divide_train` there is no `test`, whatever splits there are.

    Raises:
        UserError: a split is missing; the message shows those present.
    """
    splits, spec = source.splits, source.spec
    absent = f"{source.name} has no split {{!r}}; splits: {', '.join(splits)}."
    if spec:
        held_out = [spec.test_split] if spec.test_split and not divide_train else []
        for name in ("train", *held_out):
            if name not in splits and not (source.copy and split == "all"):  # a copy need not be whole
                ways = " or --divide_train" if name != "train" else ""
                remedy = f"Put {name}.parquet into {source.copy}, or take --split all{ways}." if source.copy else ""
                raise UserError(f"{absent.format(name)} {remedy or 'Another --dataset_revision may have it.'}")
    else:
        held_out = [name for name in ("test", *VALIDATION_NAMES) if name in splits and not divide_train]
    # hidden test labels are common on the hub; the validation split is then what can be scored
    labelled = [name for name, rows in splits.items() if _has_labels(rows, label)]
    if split == "all":
        return {name: splits[name] for name in labelled} or splits
    test = next((name for name in held_out if name in labelled), next(iter(held_out), None))
    train = next(iter(splits)) if len(splits) == 1 and test is None else "train"
    if train not in splits and (test is None or split == "train"):
        raise UserError(f"{absent.format(train)} Name one of them train, or take --split all.")
    if test in VALIDATION_NAMES and not spec:
        print(f"{source.name}: {test} serves as the test split")
    return {part: splits[name] for part, name in (("train", train), ("test", test)) if name in splits}


def _labelled_rows(settings: Data, source: Source, tables: dict[str, Table]) -> tuple[dict[str, Rows], bool]:
    """The rows that have a label, by part, and whether the task is a regression."""
    first = next(iter(tables.values()))
    label = label_column_name(settings, source, first)
    pieces = text_pieces(settings, source, first, label)
    written = {part: read_column(source, rows, label, "--label_column") for part, rows in tables.items()}
    check_class_names([rows.class_names for rows in tables.values()], f"the splits of {source.name}")
    cells = label_cells(source.name, [cell for of_part in written.values() for cell in of_part])
    regression, labels = _is_regression(settings, source, cells), split_like(cells, written)
    if regression:
        labels = {part: target_cells(source.name, part, of_part) for part, of_part in labels.items()}
    elif settings.task == "auto" and not source.spec:
        check_words(source.name, labels)
    parts = {}
    for part, rows in tables.items():
        texts = join_texts(source, part, rows, pieces)
        empty = [row for row, text in enumerate(texts, 1) if not text]
        if empty and source.own:
            raise UserError(
                f"{len(empty)} {part} texts of {source.name} are empty: rows {listed(empty)}. Fill or remove them."
            )
        missing = [row for row, cell in enumerate(labels[part]) if is_missing(cell, regression)]
        if len(missing) == len(texts):
            found = "no rows" if not texts else f"{len(texts)} {part} rows, their labels all missing or -1"
            raise UserError(f"{source.name} has {found} (label column {label!r}). Label them, or see --label_column.")
        if missing:
            told = f"{len(missing)} {part} rows of {source.name} without a label (missing or -1) are left out"
            warn(told + told_missing(written[part], missing))
        group_by = source.spec.group_by if source.spec and not settings.ungrouped_split else ()
        columns = [render_column(source.name, part, name, read_column(source, rows, name, "--dataset_revision"))
                   for name in group_by]  # fmt: skip
        kept = sorted(set(range(len(texts))) - set(missing))
        parts[part] = Rows(texts, labels[part], linked_groups(columns) if columns else None).take(kept)
    return parts, regression


def _divide(settings: Data, source: Source, rows: Rows, regression: bool) -> dict[str, Rows]:
    """Train and test of data without a held-out split.

    Differs from the paper: the rows of one question of `medical` stay on one side. The paper splits rows, which puts
    the same question with the opposite label on the other side; `ungrouped_split` gives that split.

    Raises:
        UserError: too few rows for two splits, or all of one group.
    """
    if len(rows.texts) < 2:
        raise UserError(f"{source.name} has {len(rows.texts)} labelled rows; a 70/30 split needs at least two.")
    if source.spec is None:
        classes = np.array(["" if regression else str(label) for label in rows.labels])
        train, test = seeded_split(classes, settings.seed)
    elif rows.groups is None:
        train, test = paper_split(len(rows.texts))
    else:
        if len(set(rows.groups)) < 2:
            raise UserError(f"All rows of {source.name} share a question: take --split all or --ungrouped_split.")
        train, test = grouped_split(rows.groups)
    return {"train": rows.take(train), "test": rows.take(test)}


def _without_empty(source: Source, parts: dict[str, Rows]) -> dict[str, Rows]:
    """The rows whose text is not empty; after the split, so that leaving one out moves no other row."""
    found = {}
    for part, rows in parts.items():
        kept = [row for row, text in enumerate(rows.texts) if text]
        if len(kept) < len(rows.texts):
            warn(f"{len(rows.texts) - len(kept)} {part} rows of {source.name} have no text; left out")
        if not kept:
            raise UserError(f"All {part} texts of {source.name} are empty. Is --text_column right?")
        found[part] = rows.take(kept)
    return found


# ------------------------------------------------------------------ labels
def _encode(source: Source, parts: dict[str, Rows], label: str) -> tuple[dict[str, Rows], list[str]]:
    """Rows with labels 0..c-1, and the c class names: the classes of the first part (train, if it exists), sorted."""
    values = class_values(source.name, [cell for rows in parts.values() for cell in rows.labels])
    labels = split_like(values, {part: rows.labels for part, rows in parts.items()})
    first = next(iter(parts))
    classes = sorted(set(labels[first]))
    # a number beyond the class names of the file, or a word, is its own name
    known = dict(enumerate(next(iter(source.splits.values())).class_names.get(label, ())))
    spelled = {value: known.get(value, str(value)) for value in set(values)}
    if len(classes) < 2:
        raise UserError(
            f"The {first} labels of {source.name} are all {spelled[classes[0]]!r}; at least two classes are needed. "
            "See --label_column; where -1 is a class, and not a missing label, name it in words."
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{source.name} has {len(classes):,} classes in {len(labels[first]):,} {first} rows; up to {MAX_CLASSES:,} "
            "are possible. Is --label_column the class, and not the number of a row? Numbers: --task regression."
        )
    index = {value: number for number, value in enumerate(classes)}
    encoded = {}
    for part, rows in parts.items():
        kept = [row for row, value in enumerate(labels[part]) if value in index]
        if len(kept) < len(rows.texts):
            unseen = listed(sorted(spelled[value] for value in set(labels[part]) - set(classes)))
            told = f"{len(rows.texts) - len(kept)} {part} rows of {source.name} have classes that train lacks: {unseen}"
            if source.own or not kept:
                raise UserError(f"{told}. Correct them, add rows of these classes to train, or take --split all.")
            warn(f"{told}; left out")
        encoded[part] = Rows([rows.texts[row] for row in kept], [index[labels[part][row]] for row in kept])
    return encoded, [spelled[value] for value in classes]


def _check_targets(name: str, parts: Mapping[str, np.ndarray]) -> None:
    """Refuses regression targets whose moments, sums of squares about 0, would lose their digits."""
    first = next(iter(parts))
    for part, numbers in parts.items():
        if numbers.min() == numbers.max():
            if part == first:
                raise UserError(f"The {first} targets of {name} are all equal. See --label_column or --max_samples.")
            continue
        largest = float(np.abs(numbers).max())
        scaled = numbers / largest  # squares of the numbers themselves may overflow
        mean, std = float(scaled.mean()), float(scaled.std())
        told = f"The {part} targets of {name} run from {numbers.min():.9g} to {numbers.max():.9g}, with a standard "
        told += f"deviation of {std * largest:.3g}"
        if abs(mean) > MAX_MEAN * std:
            raise UserError(
                f"{told}, and their mean is more than {MAX_MEAN:,.0f} times as large: subtract a constant from the "
                f"column first, such as {mean * largest:.9g}."
            )
        if not SPREADS[0] <= std * largest <= SPREADS[1]:
            raise UserError(
                f"{told}, which must be within {SPREADS[0]:g} and {SPREADS[1]:g}: rescale the column first."
            )


# ------------------------------------------------------------------ load
def _report(settings: Data, source: Source, parts: dict[str, Rows], label_names: list[str], divided: bool) -> None:
    """Prints sizes, split rule and leak; warns of a leak, and of a dataset that is not as the table says."""
    spec, sizes = source.spec, {part: len(rows.texts) for part, rows in parts.items()}
    facts = [" and ".join(f"{size:,} {part}" for part, size in sizes.items()) + " texts"]
    facts.append(f"{len(label_names)} classes" if label_names else "a regression target")
    if {"train", "test"} <= set(parts):
        if spec and ((settings.divide_train and not spec.group_by) or (spec.group_by and settings.ungrouped_split)):
            facts.append("seeded 70/30")
        elif spec:
            facts.append(spec.split_rule)
        else:
            facts.append(f"split 70/30 by seed {settings.seed}" if divided else "own test")
        if spec and spec.sizes and sum(spec.sizes) != sum(sizes.values()):
            cause = "this copy holds others" if source.copy else "the hub has changed, or the known sizes are wrong"
            warn(f"{source.name} was known with {spec.sizes[0]:,} and {spec.sizes[1]:,} rows; {cause}")
        leaked = leaked_share(parts["train"].texts, parts["test"].texts)
        facts.append(f"{leaked:.1%} of the test texts are also in train")
        if leaked > LEAK_WARNING:
            warn(f"{leaked:.1%} of the test texts of {source.name} are also in train: test scores reward memory")
    print(f"{source.name}: {', '.join(facts)}")


def _fingerprint(source: Source, texts: list[str], labels: np.ndarray) -> str:
    """First 16 hex digits of the SHA-256 over the texts, each ended by a zero byte, and the labels."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts, 1):
        if source.own and "\0" in text:  # a zero byte ends a text: others might have the same fingerprint
            raise UserError(f"Text {number} of {source.name} holds a zero character. Remove it: the text is damaged.")
        try:
            digest.update(text.encode() + b"\0")
        except UnicodeEncodeError as error:
            raise UserError(f"Text {number} of {source.name} is not valid Unicode ({error}). Correct it.") from None
    digest.update(labels.tobytes())
    return digest.hexdigest()[:16]


def _sample(settings: Data, source: Source, part: str, rows: Rows, label_names: list[str]) -> LabelledTexts:
    """The rows of one split, at most as many as the settings allow, with their fingerprint."""
    texts, labels = rows.texts, np.array(rows.labels, dtype=np.int64 if label_names else np.float64)
    most = (settings.max_test_samples if part == "test" else None) or settings.max_samples
    if most is not None and most < len(texts):
        classes = labels if label_names else np.zeros(len(texts))
        chosen = stratified_rows(classes, most, settings.seed)
        texts, labels = [texts[row] for row in chosen], labels[chosen]
    return LabelledTexts(texts, labels, label_names, _fingerprint(source, texts, labels))


def load_splits(settings: Data, run: Run, wanted: str = "both") -> dict[str, LabelledTexts]:
    """The texts and labels of `train` and `test`, or of `all`: every labelled row, undivided.

    Classes are those of train in every split. `seed` draws the split of data that has none, and the rows of
    `max_samples` and `max_test_samples`; the splits of the known datasets are fixed.

    Args:
        settings: the dataset.
        run: `datasets_dir` is read.
        wanted: "both", or the one split that is needed: "train", "test" or "all".

    Raises:
        UserError: the dataset cannot be found or read, or its rows do not make a task.
    """
    source = find_source(settings.dataset_name, settings.dataset_revision, run.datasets_dir)
    label = label_column_name(settings, source, next(iter(source.splits.values())))
    tables = choose_parts(source, label, "train" if wanted == "both" else wanted, settings.divide_train)
    parts, regression = _labelled_rows(settings, source, tables)
    divided = list(parts) == ["train"] and wanted != "all"
    if wanted == "all":
        texts = [text for rows in parts.values() for text in rows.texts]
        parts = {"all": Rows(texts, [cell for rows in parts.values() for cell in rows.labels])}
    elif divided:
        parts = _divide(settings, source, parts["train"], regression)
    parts = _without_empty(source, parts)
    label_names: list[str] = []
    if not regression:
        parts, label_names = _encode(source, parts, label)
    _report(settings, source, parts, label_names, divided)
    found = {part: _sample(settings, source, part, rows, label_names) for part, rows in parts.items()}
    if regression:
        _check_targets(source.name, {part: texts.labels for part, texts in found.items()})
    return found


def load_texts(settings: Data, run: Run, split: str) -> LabelledTexts:
    """The texts and labels of one split, as `load_splits` gives them."""
    return load_splits(settings, run, split)[split]


def one_hot_targets(data: LabelledTexts, rows: np.ndarray | slice = slice(None)) -> Tensor:
    """Labels of some rows as y, (b, c) float64: one-hot rows of classes, or the regression target as it is."""
    labels = torch.from_numpy(np.asarray(data.labels)[rows])
    if data.is_regression:
        return labels.double().reshape(len(labels), -1)
    # the one-hot of torch is int64, a second copy
    targets = torch.zeros(len(labels), data.num_labels, dtype=torch.float64)
    return targets.scatter_(1, labels.long()[:, None], 1)


@dataclass(frozen=True)
class Config:
    """No settings: the command prints the known datasets."""


def main(config: Config) -> None:
    """Prints the known datasets; needs no network."""
    print(table())


if __name__ == "__main__":
    run_script(main, Config, __doc__)
