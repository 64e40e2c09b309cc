"""Compares local copies of the known datasets with the table: `python -m utils.data.load --check FOLDER`.

Each copy is read as in a run, and what it holds is printed beside what the table says.
"""

import string
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.data.columns import column, join_texts
from utils.data.labels import class_values, is_missing, label_cells
from utils.data.rows import Rows, known_split, leaked_share, linked_groups
from utils.data.sources import Source, copied_source
from utils.data.table import DATASETS, SPECS, DatasetSpec
from utils.data.texts import render_column
from utils.script import UserError

CountTokens = Callable[[Sequence[str]], Sequence[int]]


def check_copies(folder: Path, count_tokens: CountTokens | None = None) -> tuple[str, bool]:
    """What the copies in a folder hold, as text, and whether every column and class is as the table says.

    Args:
        folder: one folder per dataset, as `--datasets_dir` takes it.
        count_tokens: number of tokens of each text, (n,); None leaves their mean out.

    Raises:
        UserError: there is no folder, or no copy in it.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder.absolute()}.")
    names = {spec.key.replace("/", "__"): spec.key for spec in SPECS}
    found = sorted(path.name for path in folder.iterdir() if any(path.glob("*.parquet")))
    if not found:
        raise UserError(f"No copy in {folder}: it needs <dataset>/train.parquet, with / in the name as __.")
    blocks, right = [], True
    for place in found:
        key = names.get(place)
        if key is None:
            blocks.append(
                f"{place}\n  not in the table; --dataset_name {place.replace('__', '/')} reads it all the same"
            )
            continue
        try:
            lines, faults = check_copy(copied_source(key, folder), DATASETS[key], count_tokens)
        except UserError as error:
            lines, faults = [], [str(error)]
        lines += [f"NOT AS THE TABLE SAYS: {fault}" for fault in faults]
        wrapped = [textwrap.fill(line, 118, initial_indent="  ", subsequent_indent="    ") for line in lines]
        blocks.append("\n".join([key, *wrapped]))
        right = right and not faults
    absent = [key for place, key in names.items() if place not in found]
    if absent:
        blocks.append(f"without a copy: {', '.join(absent)}")
    return "\n".join(blocks), right


def check_copy(source: Source, spec: DatasetSpec, count_tokens: CountTokens | None) -> tuple[list[str], list[str]]:
    """Lines about one copy, and its columns and classes that are not as the table says.

    Raises:
        UserError: a file or a cell cannot be read.
    """
    pieces = [(literal, name) for literal, name, _, _ in string.Formatter().parse(spec.text_template)]
    needed = {name for _, name in pieces if name} | {spec.label_column, *spec.group_by}
    faults = [
        f"{split} has no column {name!r}; columns: {', '.join(rows.columns)}"
        for split, rows in source.splits.items()
        for name in sorted(needed - set(rows.columns))
    ]
    if faults:
        return [], faults
    parts = labelled_parts(source, spec, pieces)
    lines = [sizes_line(source, spec, parts)]
    if spec.num_classes != 0:
        line, faults = compare_classes(source, spec, parts)
    else:
        targets = [float(label) for rows in parts.values() for label in rows.labels]
        line = f"targets {min(targets):g} to {max(targets):g}" if targets else "no targets"
    lines.append(line)
    if spec.test_split is None:
        train, test = known_split(source, parts["train"]) if "train" in parts else ((), ())
        leak = leaked_share(parts["train"].take(train).texts, parts["train"].take(test).texts)
    elif {"train", spec.test_split} <= set(parts):
        leak = leaked_share(parts["train"].texts, parts[spec.test_split].texts)
    else:
        leak = None
    lines.append("leak unknown: a split is missing" if leak is None else f"{leak:.1%} of the test texts are in train")
    if count_tokens is not None:
        counts = [count for rows in parts.values() for count in count_tokens(rows.texts)]
        lines.append(f"{sum(counts) / max(len(counts), 1):.1f} tokens per text")
    return lines, faults


def labelled_parts(source: Source, spec: DatasetSpec, pieces: list[tuple[str, str | None]]) -> dict[str, Rows]:
    """Texts, label cells and groups of the rows that have a label, by split; splits without labels are left out."""
    parts = {}
    for split, table in source.splits.items():
        labels = label_cells(source.name, column(source, table, spec.label_column, "--label_column"))
        rows = Rows(join_texts(source, split, table, pieces), labels)
        if spec.group_by:
            together = [render_column(source.name, split, name, table.columns[name][:]) for name in spec.group_by]
            rows = Rows(rows.texts, rows.labels, linked_groups(together))
        kept = [row for row, label in enumerate(labels) if not is_missing(label, spec.num_classes == 0)]
        if kept:
            parts[split] = rows.take(kept)
    return parts


def sizes_line(source: Source, spec: DatasetSpec, parts: dict[str, Rows]) -> str:
    """Labelled rows per split beside the table's sizes, which are those after the split rule."""
    known: dict[str, int] = {}
    if spec.sizes:
        known = {"train": sum(spec.sizes)} if spec.test_split is None else {"train": spec.sizes[0]}
        known |= {spec.test_split: spec.sizes[1]} if spec.test_split else {}
    told = []
    for split in dict.fromkeys([*known, *source.splits]):
        if split not in source.splits:
            told.append(f"{split} missing (table {known[split]:,})")
            continue
        labelled, rows = len(parts[split].texts) if split in parts else 0, source.splits[split].num_rows
        beside = f"table {known[split]:,}" if split in known else "not used"
        differs = ", another selection" if split in known and known[split] != labelled else ""
        hidden = f", {rows - labelled:,} more without a label" if labelled < rows else ""
        told.append(f"{split} {labelled:,} rows ({beside}{differs}{hidden})")
    return f"{'; '.join(told)}; split rule: {spec.split_rule}"


def compare_classes(source: Source, spec: DatasetSpec, parts: dict[str, Rows]) -> tuple[str, list[str]]:
    """Names and counts per split of the classes, and what differs from the table."""
    faults = []
    used = {split: rows for split, rows in parts.items() if split in ("train", spec.test_split)}
    values = {split: class_values(source.name, rows.labels) for split, rows in used.items()}
    classes: list[Any] = sorted({value for of_split in values.values() for value in of_split})
    names = next(iter(source.splits.values())).class_names.get(spec.label_column, [])
    by_number = bool(names) and all(isinstance(value, int) for value in classes)
    spelled = {value: names[value] if by_number and value < len(names) else str(value) for value in classes}
    found = list(names) if by_number else list(spelled.values())
    if spec.class_names and found != list(spec.class_names):
        faults.append(f"classes {', '.join(found)}; table: {', '.join(spec.class_names)}")
    if spec.num_classes is not None and len(classes) != spec.num_classes:
        faults.append(f"{len(classes)} classes have rows; table: {spec.num_classes}")
    for split, of_split in values.items():
        lacking = [spelled[value] for value in classes if value not in set(of_split)]
        if lacking:
            faults.append(f"{split} lacks the classes {', '.join(lacking)}")
    counts = {split: Counter(of_split) for split, of_split in values.items()}
    told = [f"{spelled[value]} {'/'.join(str(count[value]) for count in counts.values())}" for value in classes]
    return f"{len(classes)} classes ({'/'.join(values)} rows): {', '.join(told)}", faults
