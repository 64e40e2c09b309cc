"""Where the rows of a dataset come from: the hub, a local file or folder, the docstring tasks.

Every source ends as a `Source`: one `Table` of columns per split, nothing encoded, dropped or divided yet; that is
`data.py`. Local files are read here, and not by `datasets`, so that no cell changes its type and a fault is named by
file and line. Nothing from a hub is ever executed: datasets with a loading script are refused by the library itself.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from utils.datasets_table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
from utils.hub import Repository, hub_errors, nearest
from utils.io import UserError

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(VALIDATION_NAMES, "validation")


@dataclass(frozen=True)
class Table:
    """The rows of one split, by column."""

    columns: Mapping[str, Sequence[Any]]  # `[:]` reads a column
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns
    untyped: bool = False  # from csv: a label is a string, even where it is a number


@dataclass(frozen=True)
class Source:
    """Everything found under one dataset name."""

    name: str
    splits: dict[str, Table]
    spec: DatasetSpec | None = None
    own: bool = False  # the user can mend the rows: faults are errors; elsewhere such rows are left out with a warning


# ------------------------------------------------------------------ the hub
def _load_hub(
    hub_id: str, config: str | None, revision: str | None, data_files: Mapping[str, str] | None = None
) -> datasets.DatasetDict:
    """All splits of a dataset of the hub; no code of it is executed.

    Raises:
        UserError: unknown, gated, offline, no such revision or configuration, no data file that can be read.
    """
    instead = "a local file or docstrings/<task>; known: python -m utils.data"
    repository = Repository(hub_id, "Dataset", tuple(DATASETS), instead, revision, "--dataset_revision")
    with hub_errors(repository):
        try:
            return datasets.load_dataset(hub_id, config, revision=revision, data_files=data_files)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or revision is not None:
                raise
    return _load_hub(hub_id, config, PARQUET_BRANCH, data_files)


def _hub_source(name: str, spec: DatasetSpec | None, revision: str | None) -> Source:
    """A dataset of the hub; `name` may be `id:config` where it is not in the table."""
    hub_id, _, config = (spec.hub_id, "", spec.config) if spec else name.partition(":")
    pinned = spec.revision if spec else None
    loaded = _load_hub(hub_id, config or None, revision or pinned, spec.data_files if spec else None)
    splits = {}
    for split, rows in loaded.items():
        columns = {column: rows[column] for column in rows.column_names}
        splits[str(split)] = Table(columns, _class_names(rows.features))
    return Source(name, splits, spec)


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: list(kind.names) for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


# ------------------------------------------------------------------ local files
def _decode(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {error.start}, line {line}. Convert it, e.g. iconv -f latin1 -t utf-8."
        ) from None


def _records_table(path: Path, records: Sequence[tuple[int, Any]]) -> Table:
    """Objects with the number of their line (or item) as columns; a key that an object lacks is None."""
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, row {number}: {str(record)[:40]!r} is not an object like {{"text": ..., "label": ...}}.'
            )
    names = dict.fromkeys(name for _, record in records for name in record)
    return Table({name: [record.get(name) for _, record in records] for name in names})


def _read_json_lines(path: Path, text: str | None = None) -> Table:
    records = []
    # only \n ends a line: splitlines() would also cut at U+2028, which JSON strings may hold
    for number, line in enumerate((_decode(path) if text is None else text).split("\n"), 1):
        if line.strip():
            try:
                records.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error.msg}, column {error.colno}): {line.strip()[:60]!r}. "
                    "Each line must be one JSON object."
                ) from None
    return _records_table(path, records)


def _read_json(path: Path) -> Table:
    """One list of objects, or one object per line."""
    text = _decode(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path}, line {error.lineno} is not JSON ({error.msg}, column {error.colno}).") from None
        return _read_json_lines(path, text)
    return _records_table(path, list(enumerate(content if isinstance(content, list) else [content], 1)))


def _read_csv(path: Path, delimiter: str = ",") -> Table:
    """Every cell stays the string it is: no cell is taken for a number, a date or a missing value."""
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a long text
    reader = csv.reader(io.StringIO(_decode(path), newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]) or len(set(rows[0])) != len(rows[0]):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} cells under {len(rows[0])} columns {rows[0]}. "
                    "Column names must differ; a cell with the separator or a line break must stand in double quotes."
                )
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not {path.suffix[1:]} ({error}).") from None
    header, cells = (rows[0], rows[1:]) if rows else ([], [])
    return Table({name: [row[i] for row in cells] for i, name in enumerate(header)}, untyped=True)


def _read_parquet(path: Path) -> Table:
    try:
        content = pyarrow.parquet.ParquetFile(path).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())}).") from None
    features = datasets.Features.from_arrow_schema(content.schema)
    return Table({name: content[name].to_pylist() for name in content.column_names}, _class_names(features))


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".parquet": _read_parquet,
}


def _split_of(relative: Path) -> str | None:
    """The split that a file's name, else its folder's, stands for: `train-00000-of-00002.parquet` -> train."""
    words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def _merge(tables: list[Table]) -> Table:
    """The rows of several files of one split; a column that a file lacks is None there."""
    if len(tables) == 1:
        return tables[0]
    names = dict.fromkeys(name for part in tables for name in part.columns)
    lengths = [len(next(iter(part.columns.values()), ())) for part in tables]
    columns = {
        name: [
            cell
            for part, length in zip(tables, lengths, strict=True)
            for cell in part.columns.get(name, [None] * length)
        ]
        for name in names
    }
    return Table(columns, tables[0].class_names, any(part.untyped for part in tables))


def _local_source(name: str, path: Path) -> Source:
    """A file, which is one table whatever its name, or a folder, whose files are sorted into splits by their names.

    Raises:
        UserError: another kind of file, no data file in the folder, or some that belong to no split.
    """
    kinds = ", ".join(READERS)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path} is none of the files that can be read: {kinds}.")
        return Source(name, {"train": READERS[path.suffix.lower()](path)}, own=True)
    files = [file for suffix in READERS for file in path.rglob(f"*{suffix}")]
    files = sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise UserError(f"No data file in the folder {path}: it needs {kinds} files.")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    unnamed = by_split.pop(None, [])
    if unnamed and by_split:
        raise UserError(
            f"{unnamed[0]} belongs to no split, while {next(iter(by_split.values()))[0]} does. "
            "Put train, test or validation into every file name, or into none."
        )
    by_split = by_split or {"train": unnamed}
    splits = {
        str(split): _merge([READERS[file.suffix.lower()](file) for file in found]) for split, found in by_split.items()
    }
    return Source(name, splits, own=True)


def _docstrings_source(name: str) -> Source:
    from demo.docstrings import load_task  # it parses the installed packages: only when asked for

    parts = {split: load_task(name.removeprefix("docstrings/"), split) for split in ("train", "test")}
    return Source(name, {split: Table({"text": texts, "label": labels}) for split, (texts, labels) in parts.items()})


def find_source(name: str, revision: str | None = None) -> Source:
    """All splits of the dataset called `name`; a key of the table goes before a folder of the same name.

    Raises:
        UserError: no such key, file, folder or dataset of the hub, or one that cannot be read.
    """
    if name.startswith("docstrings/"):
        return _docstrings_source(name)
    if name in DATASETS:
        return _hub_source(name, DATASETS[name], revision)
    path = Path(name).expanduser()
    if path.exists():
        return _local_source(name, path)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"There is no file or folder {path.absolute()}.")
    if "/" not in name:
        known = [spec.key for spec in SPECS]
        raise UserError(
            f"There is no dataset {name!r}.{nearest(name, known)} Known: {', '.join(known)}, docstrings/<task>; "
            "or an id of the hub (user/name), or a local file or folder."
        )
    return _hub_source(name, None, revision)
