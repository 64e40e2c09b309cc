"""Rows of local files and folders, every cell as it is written.

    .jsonl .json   objects with a cell per column, one a line or all in one list
    .csv           a cell with a comma, a quotation mark or a line break stands in double quotes
    .tsv           no quoting: a quotation mark is a character like any other, as in GLUE
    .parquet       columns of any type
    a folder       such files, named train, test or validation; or the subsets that its README.md names (`configs:`);
                   or what `save_to_disk` of the library datasets wrote

Text is UTF-8, or UTF-16 or UTF-32 with its byte order mark. `cells.py` takes the cells for labels and texts.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.script import UserError

if TYPE_CHECKING:
    import pyarrow

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(VALIDATION_NAMES, "validation")
# the byte order mark of UTF-32 starts with that of UTF-16 and goes first
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
RECORDS_HINT = "pandas writes one object a line with to_json(path, orient='records', lines=True)"


@dataclass(frozen=True)
class Table:
    """The rows of one split, by column."""

    columns: Mapping[str, "Sequence[Any] | ArrowColumn"]  # `[:]` reads a column
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # of integer columns whose classes have names

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))


# ------------------------------------------------------------------ text, JSON, csv
def decode(path: Path) -> str:
    """The text of a file. Raises UserError where it cannot be read, has another encoding or holds zero bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = f"Convert it: iconv -f latin1 -t utf-8 {path}" if encoding == "UTF-8" else "Save it in UTF-8."
        raise UserError(f"{path} is not {encoding}: byte {error.start}, line {line}. {remedy}") from None
    if "\0" in text:
        raise UserError(
            f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds zero bytes: the file is damaged, or "
            f"UTF-16 without a byte order mark: iconv -f UTF-16LE -t utf-8 {path}"
        )
    return text.lstrip("\ufeff")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones Python would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object with the keys {', '.join(repr(name) for name, _ in pairs)}, two of them equal")
    return found


def _parse(where: str, text: str) -> Any:
    """The value of a JSON text. Raises UserError where it is none, or has two equal keys or thousands of digits."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg}, {f'line {error.lineno}, ' if error.lineno > 1 else ''}column {error.colno}"
        raise UserError(
            f"{where} is not JSON that can be read ({reason}): {text.strip()[:60]!r}. Write one object a line, such as "
            '{"text": "...", "label": "..."}, or one list of objects.'
        ) from None


def _read_json(path: Path) -> Table:
    """A list of objects, or one object a line; a key that an object lacks is a missing cell."""
    text = decode(path)
    if text.lstrip().startswith("["):
        records: Iterable[tuple[int, Any]] = enumerate(_parse(str(path), text), 1)
    else:
        lines = enumerate(io.StringIO(text, newline=None), 1)  # a raw U+2028 ends no line
        records = ((number, _parse(f"{path}, line {number}", line)) for number, line in lines if line.strip())
    first = list(itertools.islice(records, 2))
    if len(first) == 1 and _is_table(first[0][1]):
        keys = ", ".join(map(repr, list(first[0][1])[:5]))
        raise UserError(f"{path} is one object with the keys {keys}, and not one object a row. {RECORDS_HINT}.")
    columns: dict[str, list[Any]] = {}
    for row, (number, record) in enumerate(itertools.chain(first, records)):
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, row {number}: {str(record)[:40]!r} is not an object like {{"text": ..., "label": ...}}.'
            )
        for name in record:
            columns.setdefault(name, [None] * row)
        for name, cells in columns.items():
            cells.append(record.get(name))
    return Table(columns)


def _is_table(value: Any) -> bool:
    """Whether a JSON value is an object of columns or of rows, and not one row."""
    return isinstance(value, dict) and bool(value) and all(isinstance(cell, dict | list) for cell in value.values())


def _read_delimited(path: Path, advice: str, **dialect: Any) -> Table:
    """A header and rows of as many cells; every cell stays the string that is written."""
    csv.field_size_limit(2**31 - 1)  # the default is less than a long text
    reader = csv.reader(io.StringIO(decode(path), newline=""), strict=True, **dialect)
    rows: list[list[str]] = []
    try:
        for cells in filter(None, reader):  # a blank line is no row
            row = cells if rows else [name.strip(" \t\ufeff") for name in cells]
            header = rows[0] if rows else row
            if len(row) != len(header) or len(set(header)) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} cells under {len(header)} columns {header}. "
                    f"Column names must differ; {advice}"
                )
            rows.append(row)
    except csv.Error as error:
        kind = path.suffix[1:].lower()
        raise UserError(f"{path}, line {reader.line_num} is not {kind} ({error}): {advice}") from None
    return Table({name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0] if rows else [])})


def _read_csv(path: Path) -> Table:
    return _read_delimited(path, "a cell with a comma, a quotation mark or a line break stands in double quotes.")


def _read_tsv(path: Path) -> Table:
    advice = "a .tsv has no quoting, so that no cell can hold a tab or a line break: write such rows as .csv or .jsonl."
    return _read_delimited(path, advice, delimiter="\t", quoting=csv.QUOTE_NONE)


# ------------------------------------------------------------------ Arrow
@dataclass(frozen=True)
class ArrowColumn:
    """A column that becomes Python objects when it is read: one that is not needed may hold anything."""

    where: str  # file and column, for messages
    cells: "pyarrow.ChunkedArray"

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: slice) -> list[Any]:
        try:
            return self.cells.to_pylist()[rows]
        except (
            ValueError,
            OverflowError,
        ) as error:  # bytes that are no UTF-8, the year 10000; pyarrow's are ValueErrors
            raise UserError(f"{self.where} cannot be read ({' '.join(str(error).split())}).") from None


def arrow_table(where: str, content: "pyarrow.Table") -> Table:
    """The columns of an Arrow table, and the class names that `datasets` keeps in its metadata."""
    names = content.column_names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} has two columns {twice!r}. Column names must differ; rename one.")
    columns = {name: ArrowColumn(f"{where}: column {name!r}", content.column(name)) for name in names}
    try:
        features = json.loads((content.schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return Table(columns, {name: list(map(str, kind["names"])) for name, kind in classes.items()})
    except (KeyError, TypeError, ValueError, AttributeError):  # no metadata, or another library's
        return Table(columns)


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        return arrow_table(str(path), pyarrow.parquet.ParquetFile(path).read())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())}).") from None


# ------------------------------------------------------------------ files and folders
READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def check_class_names(found: Sequence[Mapping[str, list[str]]], where: str) -> None:
    """Raises UserError where one number means different classes in two of these tables; one without names is passed."""
    for first, second in itertools.combinations(found, 2):
        for name in first.keys() & second.keys():
            if first[name] != second[name]:
                raise UserError(
                    f"The class names of column {name!r} differ between {where}: {', '.join(first[name][:5])} and "
                    f"{', '.join(second[name][:5])}. Write the same names in the same order into each."
                )


def _read(files: Sequence[Path]) -> Table:
    """The rows of the files of one split; a column that a file lacks is missing cells there."""
    for file in files:
        if file.suffix.lower() not in READERS:
            raise UserError(f"{file} is none of the files that can be read: {', '.join(READERS)}.")
    tables = [READERS[file.suffix.lower()](file) for file in files]
    check_class_names([table.class_names for table in tables], "its files")
    full = [table for table in tables if table.num_rows]
    if not full:
        header = f"only the columns {', '.join(tables[0].columns)}" if tables[0].columns else "it is empty"
        raise UserError(f"{files[0]} has no rows: {header}. Write one labelled text per row.")
    if len(full) == 1:
        return full[0]
    names = dict.fromkeys(name for table in full for name in table.columns)
    columns = {
        name: [cell for table in full for cell in table.columns.get(name, [None] * table.num_rows)[:]] for name in names
    }
    return Table(columns, full[0].class_names)


def _split_of(relative: Path) -> str | None:
    """The split that a file's name, else its folder's, stands for: `train-00000-of-00002.parquet` -> train."""
    words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def _read_by_name(folder: Path) -> dict[str, Table]:
    """The tables of the data files of a folder, whose names say the split."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise UserError(f"No data file in the folder {folder}: it needs {', '.join(READERS)} files.")
    stems: dict[Path, Path] = {}
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file:
            raise UserError(f"{other} and {file} may be the same rows in two formats. Remove or rename one.")
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    unnamed = by_split.pop(None, [])
    if unnamed and by_split:
        raise UserError(
            f"{unnamed[0]} belongs to no split, while {next(iter(by_split.values()))[0]} does. "
            "Put train, test or validation into every file name, or into none."
        )
    return {str(split): _read(found) for split, found in (by_split or {"train": unnamed}).items()}


def _names_subsets(folder: Path) -> bool:
    """Whether the head of the folder's README.md names subsets, as a dataset of the hub does."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---")[0] if card.is_file() else ""
    return head.lstrip("\ufeff").startswith("---") and re.search(r"^configs\s*:", head, re.MULTILINE) is not None


def _read_subset(folder: Path, subset: str | None) -> dict[str, Table]:
    """The tables of one subset; the library `datasets` reads from README.md which files belong to it."""
    import datasets

    from utils.hub import Repository, hub_errors

    with hub_errors(Repository(str(folder), "Dataset", (), "a file of it")):
        names = datasets.get_dataset_config_names(str(folder))
        chosen = subset or datasets.get_dataset_default_config_name(str(folder))
        if chosen not in names:
            raise UserError(
                f"{folder} has the subsets {', '.join(names)}{f', not {subset!r}' if subset else ''}. Name one: "
                f"--dataset_name {folder}:{names[0]}"
            )
        files = datasets.load_dataset_builder(str(folder), chosen).config.data_files
    return {str(split): _read([Path(file) for file in found]) for split, found in files.items()}


def _read_saved(folders: Iterable[Path], top: Path) -> dict[str, Table]:
    """The tables of folders that `Dataset.save_to_disk` wrote, each one split."""
    import datasets

    from utils.hub import Repository, hub_errors

    found = {}
    for folder in folders:
        with hub_errors(Repository(str(folder), "Dataset", (), "save_to_disk again")):
            rows = datasets.load_from_disk(str(folder)).with_format("arrow")[:]
        found["train" if folder == top else folder.name] = arrow_table(str(folder), rows)
    return found


def read_files(path: Path, subset: str | None = None) -> dict[str, Table]:
    """The tables of a file, which is one table whatever its name, or of a folder, by split.

    Args:
        path: an existing file or folder.
        subset: one of those that the folder's README.md names.

    Raises:
        UserError: a file cannot be read, or it is not clear which rows are meant.
    """
    if path.is_file():
        return {"train": _read([path])}
    if saved := sorted(
        file.parent for file in path.rglob("state.json") if (file.parent / "dataset_info.json").is_file()
    ):
        return _read_saved(saved, path)
    if _names_subsets(path):
        return _read_subset(path, subset)
    if subset:
        raise UserError(f"{path} has no subsets: its README.md has no `configs:`. Leave out :{subset}.")
    return _read_by_name(path)
