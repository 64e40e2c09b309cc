"""Labelled texts by name: the known datasets, any other of the hub, the user's own files, the docstring tasks.

    python -m utils.data.load                                        # table of the known datasets, without network
    python -m utils.data.load --check FOLDER                         # local copies (--datasets_dir) beside the table
    python cache.py --dataset_name emotion                      # a key of the table, or its hub id
    python cache.py --dataset_name user/dataset:config          # any other dataset of the hub
    python cache.py --dataset_name reviews.csv --text_column review --label_column stars
    python cache.py --dataset_name docstrings/raises            # see utils/data/docstrings.py

Files are .jsonl, .json, .csv, .tsv or .parquet in UTF-8 (or UTF-16 with its mark), or a folder of them (train, test,
validation by file name). What has no held-out split is split 70/30. Rows of one's own that are empty or cannot be
encoded are errors; in a dataset of the hub, which its reader cannot fix, they are left out with a warning. Which
labels count as missing is in `labels.py`, which cells as text in `texts.py`.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.columns import column, join_texts, label_column_name, text_pieces
from utils.data.dataset_check import check_copies
from utils.data.files import check_class_names
from utils.data.labels import (
    check_words,
    is_missing,
    is_number,
    is_whole,
    label_cells,
    target_cells,
    told_missing,
    typed,
    warn,
)
from utils.data.rows import (
    TEST_SHARE,
    Rows,
    check_targets,
    cut,
    encode,
    known_split,
    leaked_share,
    linked_groups,
    paper_split,
    stratified_rows,
)
from utils.data.sources import VALIDATION_NAMES, Source, Table, find_source
from utils.data.table import DATASETS, DatasetSpec, table
from utils.data.texts import render_column
from utils.script import UserError, run_script
from utils.settings import Data, Model, Run

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "LabelledTexts",
    "leaked_share",
    "load_splits",
    "load_texts",
    "paper_split",
    "stratified_rows",
]

LEAK_WARNING = 0.01  # share of test texts that are also in train from which on a plain warning is due


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


# ------------------------------------------------------------------ labels
def is_regression(settings: Data, source: Source, labels: list[Any]) -> bool:
    """`task` decides; under `auto` the table of datasets, else any number that is not a whole one."""
    if settings.task != "auto":
        return settings.task == "regression"
    if source.spec and not settings.label_column:
        return source.spec.num_classes == 0
    present = [label for label in labels if not is_missing(label, True)]
    return all(map(is_number, present)) and any(not is_whole(label) for label in present)


# ------------------------------------------------------------------ rows and splits
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
    return known_split(source, rows)


def has_labels(rows: Table, label: str) -> bool:
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
    # hidden test labels are common on the hub; the validation split is then what can be scored
    labelled = [name for name, rows in splits.items() if has_labels(rows, label)]
    if spec:
        held_out = [spec.test_split] if spec.test_split and not divide_train else []
        for name in ("train", *held_out):
            if name not in splits and not (source.copy and split == "all"):  # a copy need not be whole
                ways = " or --divide_train" if name != "train" else ""
                remedy = f"Put {name}.parquet into {source.copy}, or take --split all{ways}." if source.copy else ""
                raise UserError(f"{absent.format(name)} {remedy or 'Another --dataset_revision may have it.'}")
    else:
        held_out = [name for name in ("test", *VALIDATION_NAMES) if name in splits and not divide_train]
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
    check_class_names([rows.class_names for rows in tables.values()], f"the splits of {source.name}")
    written = labels
    cells = label_cells(source.name, [cell for of_part in labels.values() for cell in of_part])
    regression, labels = is_regression(settings, source, cells), cut(cells, labels)
    if regression:
        labels = {part: target_cells(source.name, part, of_part) for part, of_part in labels.items()}
    elif settings.task == "auto" and not source.spec:
        check_words(source.name, labels)
    parts = {}
    for part, rows in tables.items():
        texts = join_texts(source, part, rows, pieces)
        empty = [number for number, text in enumerate(texts, 1) if not text]
        if empty and source.own:
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise UserError(f"{len(empty)} {part} texts of {source.name} are empty: rows {shown}. Fill or remove them.")
        kept = [row for row, cell in enumerate(labels[part]) if not is_missing(cell, regression)]
        if not kept:
            found = "no rows" if not texts else f"{len(texts)} {part} rows, their labels all missing or -1"
            raise UserError(f"{source.name} has {found} (label column {label!r}). Label them, or see --label_column.")
        if len(kept) < len(texts):
            told = f"{len(texts) - len(kept)} {part} rows of {source.name} without a label (missing or -1) are left out"
            warn(told + told_missing(written[part], sorted(set(range(len(texts))) - set(kept))))
        together = source.spec.group_by if source.spec and not settings.ungrouped_split else ()
        columns = [
            render_column(source.name, part, name, column(source, rows, name, "--dataset_revision"))
            for name in together
        ]
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
def split_rule(settings: Data, spec: DatasetSpec | None, divided: bool) -> str:
    """How the test rows were chosen, in words."""
    if spec:
        seeded = (settings.divide_train and not spec.group_by) or (spec.group_by and settings.ungrouped_split)
        return "seeded 70/30" if seeded else spec.split_rule
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
            cause = "this copy holds others" if source.copy else "the hub has changed, or the known sizes are wrong"
            warn(f"{source.name} was known with {expected} rows; {cause}")
        leaked = leaked_share(parts["train"].texts, parts["test"].texts)
        facts.append(f"{leaked:.1%} of the test texts are also in train")
        if leaked > LEAK_WARNING:
            warn(f"{leaked:.1%} of the test texts of {source.name} are also in train: test scores reward memory")
    print(f"{source.name}: {', '.join(facts)}")


def fingerprint(source: Source, texts: list[str], labels: np.ndarray) -> str:
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


def load_splits(settings: Data, run: Run, wanted: str = "both") -> dict[str, LabelledTexts]:
    """The texts and labels of `train` and `test`, or of `all`: every labelled row, undivided.

    Classes are those of train in every split. `seed` draws the split of data that has none, and the rows of
    `max_samples` and `max_test_samples`; the splits of the known datasets are fixed.

    Args:
        settings: the dataset.
        run: `datasets_dir` is read.
        wanted: "both", or the one split that must be there: "train", "test" or "all".

    Raises:
        UserError: the dataset cannot be found or read, or its rows do not make a task.
    """
    source = find_source(settings.dataset_name, settings.dataset_revision, run.datasets_dir)
    label = label_column_name(settings, source, next(iter(source.splits.values())))
    needed = "train" if wanted == "both" else wanted
    parts, regression = labelled_rows(settings, source, choose_parts(source, label, needed, settings.divide_train))
    divided = list(parts) == ["train"] and wanted != "all"
    if wanted == "all":
        texts = [text for rows in parts.values() for text in rows.texts]
        parts = {"all": Rows(texts, [cell for rows in parts.values() for cell in rows.labels])}
    elif divided:
        train, test = divide(settings, source, parts["train"], not regression)
        parts = {"train": parts["train"].take(train), "test": parts["train"].take(test)}
    parts = without_empty(source, parts)
    label_names: list[str] = []
    if not regression:
        parts, label_names = encode(source, parts, next(iter(source.splits.values())).class_names.get(label))
    report(source, parts, label_names, split_rule(settings, source.spec, divided))
    found = {part: sample(settings, source, part, rows, label_names) for part, rows in parts.items()}
    if regression:
        check_targets(source.name, {part: of.labels for part, of in found.items()})
    return found


def sample(settings: Data, source: Source, part: str, rows: Rows, label_names: list[str]) -> LabelledTexts:
    """The rows of one split, at most as many as the settings allow, with their fingerprint."""
    texts, labels = rows.texts, np.array(rows.labels, dtype=np.int64 if label_names else np.float64)
    most = (settings.max_test_samples if part == "test" else None) or settings.max_samples
    if most is not None and most < len(texts):
        classes = labels if label_names else np.zeros(len(texts))
        chosen = stratified_rows(classes, most, settings.seed)
        texts, labels = [texts[row] for row in chosen], labels[chosen]
    return LabelledTexts(texts, labels, label_names, fingerprint(source, texts, labels))


def load_texts(settings: Data, run: Run, split: str) -> LabelledTexts:
    """The texts and labels of one split, as `load_splits` gives them."""
    return load_splits(settings, run, split)[split]


@dataclass(frozen=True)
class Config:
    """What to print."""

    check: Path | None = None  # folder of copies, as --datasets_dir takes it: compare them with the table
    model_name: str = "tiny"  # its tokenizer counts the tokens of their texts


def token_counter(model_name: str) -> Callable[[Sequence[str]], list[int]]:
    """The function that gives the number of tokens of each text, uncut."""
    from utils.models.identity import load_config  # transformers takes seconds to load, which a table need not wait for
    from utils.models.load import load_tokenizer

    model, run = Model(model_name), Run()
    tokenizer = load_tokenizer(model, run, load_config(model, run))
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def main(config: Config) -> None:
    """Prints the known datasets, or what the copies in a folder hold; needs no network.

    Raises:
        UserError: a column or class of a copy is not as the table says.
    """
    if config.check is None:
        print(table())
        return
    text, as_the_table_says = check_copies(config.check, token_counter(config.model_name))
    print(f"{text}\ntokens are those of {config.model_name}")
    if not as_the_table_says:
        raise UserError(f"A copy in {config.check} is not as the table says; see above.")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
