"""Rows of local files: .jsonl, .json, .csv, .tsv and .parquet, and folders of them.

Read here, and not by `datasets`, so that no cell changes its type, no row is lost, and a fault is named by file and
line. Nothing is encoded or dropped yet; what a cell means is `labels.py` and `texts.py`.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import pyarrow
import pyarrow.parquet

from utils.script import UserError

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(VALIDATION_NAMES, "validation")
# byte order marks; that of UTF-32 starts with that of UTF-16 and goes first
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LINES_HINT = "pandas writes one object per line with to_json(path, orient='records', lines=True)"


@dataclass(frozen=True)
class Table:
    """The rows of one split, by column."""

    columns: Mapping[str, Sequence[Any]]  # `[:]` reads a column
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns
    untyped: bool = False  # from csv: a label is a string, even where it is a number

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))


# ------------------------------------------------------------------ characters
def decode(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        UserError: it cannot be read, is in another encoding, or holds zero bytes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    convert = "Convert it, e.g. iconv -f {} -t utf-8."
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        name = "UTF-8" if encoding.startswith("utf-8") else f"{encoding.upper()}, as its first bytes say"
        advice = convert.format("latin1") if name == "UTF-8" else "Is it complete? Save it in UTF-8."
        raise UserError(f"{path} is not {name}: byte {error.start}, line {line}. {advice}") from None
    if "\0" in text:
        if content.count(b"\0") >= len(content) // 4:
            little = content.index(b"\0") % 2 == 1
            advice = f"It looks like UTF-16 without a mark: iconv -f UTF-16{'LE' if little else 'BE'} -t utf-8."
        else:
            advice = "The file is damaged, or no text: remove them, e.g. tr -d '\\000'."
        raise UserError(f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds zero bytes. {advice}")
    return text.lstrip("\ufeff")  # some programs write a second mark


def split_lines(text: str) -> Iterator[str]:
    r"""The lines; only \n, \r\n or, in a file without any \n, \r ends one: U+2028 may stand in a text."""
    mark, start = "\n" if "\n" in text else "\r", 0
    while (end := text.find(mark, start)) >= 0:
        yield text[start:end].removesuffix("\r")
        start = end + 1
    yield text[start:].removesuffix("\r")


# ------------------------------------------------------------------ JSON
def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; of two equal ones Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def _parse(path: Path, text: str, line: int | None = None) -> Any:
    """The value of a JSON text. Raises ValueError for one that is none, UserError for a number no program reads."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError:
        raise
    except KeyError as error:
        place = f"{path}, line {line}" if line else str(path)
        raise UserError(f"{place} has an object with two keys {error}. Keys must differ; rename one.") from None
    except (ValueError, RecursionError) as error:  # more than 4,300 digits; thousands of brackets
        place = f"{path}, line {line}" if line else str(path)
        reason = "a number of thousands of digits" if isinstance(error, ValueError) else "thousands of nested brackets"
        raise UserError(f"{place} holds {reason}. Write such a label as a string in quotes.") from None


def _records_table(path: Path, records: Iterable[tuple[int, Any]]) -> Table:
    """Objects with the number of their line (or item) as columns; a key that an object lacks is None.

    Each object is taken apart as it comes: all of them at once would need several times the memory of their cells.
    """
    columns: dict[str, list[Any]] = {}
    for row, (number, record) in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, row {number}: {str(record)[:40]!r} is not an object like {{"text": ..., "label": ...}}.'
            )
        for name in record:
            if name not in columns:
                columns[name] = [None] * row
        for name, cells in columns.items():
            cells.append(record.get(name))
    return Table(columns)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line that is not blank.

    Raises:
        UserError: a line that is not JSON.
    """
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                yield number, _parse(path, line, number)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error.msg}, column {error.colno}): {line.strip()[:60]!r}. "
                    "Each line must be one JSON object."
                ) from None


def _read_json_lines(path: Path, text: str | None = None) -> Table:
    records = _json_lines(path, decode(path) if text is None else text)
    first = list(itertools.islice(records, 2))
    if len(first) == 1 and isinstance(first[0][1], dict):  # a table in one line
        return _object_table(path, first[0][1])
    return _records_table(path, itertools.chain(first, records))


def _read_json(path: Path) -> Table:
    """One list of objects, one object per line, or one object of columns as pandas writes it."""
    text = decode(path)
    try:
        content = _parse(path, text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path}, line {error.lineno} is not JSON ({error.msg}, column {error.colno}).") from None
        return _read_json_lines(path, text)
    if isinstance(content, dict):
        return _object_table(path, content)
    return _records_table(path, list(enumerate(content if isinstance(content, list) else [content], 1)))


def _object_table(path: Path, content: dict[str, Any]) -> Table:
    """A file that is one object: a single row, the columns of a table, or its rows by their index.

    Raises:
        UserError: it is none of these, such as {"data": [...]}.
    """
    values = list(content.values())
    if not values or not all(isinstance(value, dict | list) for value in values):
        return _records_table(path, [(1, content)])
    if all(isinstance(value, dict) for value in values):
        keys = [list(value) for value in values]
        if all(key.isdigit() for key in content):  # {"0": {"text": ..., "label": ...}, "1": ...}
            return _records_table(path, list(enumerate(values, 1)))
        if all(of_value == keys[0] for of_value in keys) and all(key.isdigit() for key in keys[0]):
            return Table({name: list(cells.values()) for name, cells in content.items()})
    elif (
        len(values) > 1
        and all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
        and "data" not in content  # {"columns": [...], "index": [...], "data": [...]}
    ):
        return Table(content)
    keys_found = ", ".join(map(repr, list(content)[:5]))
    raise UserError(
        f"{path} is one object with the keys {keys_found}; what is read is a list of objects, one object per line, "
        f"or columns of cells. {LINES_HINT}."
    )


# ------------------------------------------------------------------ csv, tsv
def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not blank, quotation marks holding a cell together."""
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a long text
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not {path.suffix[1:].lower()} ({error}).") from None


def _rows_table(path: Path, rows: Sequence[tuple[int, list[str]]], advice: str) -> Table:
    """Rows of cells, the first the header, as columns.

    Raises:
        UserError: a row has more or fewer cells than the header, or two columns have one name.
    """
    header = [name.strip(" \t\ufeff") for name in rows[0][1]] if rows else []
    for line, row in rows:
        if len(row) != len(header) or len(set(header)) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(row)} cells under {len(header)} columns {header}. "
                f"Column names must differ; {advice}"
            )
    return Table({name: [row[i] for _, row in rows[1:]] for i, name in enumerate(header)}, untyped=True)


def _read_csv(path: Path) -> Table:
    """Every cell stays the string it is: no cell is taken for a number, a date or a missing value."""
    rows = list(_csv_rows(path, decode(path), ","))
    return _rows_table(path, rows, "a cell with the separator or a line break must stand in double quotes.")


def _read_tsv(path: Path) -> Table:
    """Tab-separated cells in which a quotation mark is a character, as in GLUE, unless the file shows its quoting.

    It does where every name of the header is quoted, where every cell with a mark is quoted as a writer has to (marks
    within are doubled), or where only that reading gives every row as many cells as the header.

    Raises:
        UserError: no reading gives equal rows, or a quoted cell would hold what looks like whole rows.
    """
    text = decode(path)
    plain = [(number, line.split("\t")) for number, line in enumerate(split_lines(text), 1) if line.strip("\r\n")]
    advice = "a tab or a line break within a cell needs double quotes around the cell."
    if '"' not in text or not plain:
        return _rows_table(path, plain, advice)
    width = len(plain[0][1])
    even = all(len(row) == width for _, row in plain)
    try:
        quoted = list(_csv_rows(path, text, "\t"))
    except UserError:
        quoted = []
    if not quoted or any(len(row) != len(quoted[0][1]) for _, row in quoted) or quoted == plain:
        return _rows_table(path, plain, advice)
    marked = [cell for _, row in plain for cell in row if '"' in cell]
    if all(map(_is_quoted, plain[0][1])) or all(_is_quoted(cell) and '""' in cell[1:-1] for cell in marked):
        return _rows_table(path, quoted, advice)
    if even:
        return _rows_table(path, plain, advice)
    for line, row in quoted:
        if any("\t" in cell and "\n" in cell for cell in row):
            raise UserError(
                f"{path}, line {line}: a cell in double quotes holds tabs and line breaks, and may be several rows "
                "whose quotation marks are characters. Write the file as .csv or .jsonl."
            )
    return _rows_table(path, quoted, advice)


def _is_quoted(cell: str) -> bool:
    """Whether a cell is one that a writer put between quotation marks, those within doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


# ------------------------------------------------------------------ parquet
@dataclass(frozen=True)
class ArrowColumn(Sequence[Any]):
    """A column that becomes Python objects when it is read: those of no use need not be readable."""

    path: Path
    name: str
    cells: pyarrow.ChunkedArray

    def __len__(self) -> int:
        return len(self.cells)

    @overload
    def __getitem__(self, rows: int) -> Any: ...
    @overload
    def __getitem__(self, rows: slice) -> list[Any]: ...
    def __getitem__(self, rows: int | slice) -> Any:
        try:
            return self.cells.to_pylist()[rows] if isinstance(rows, slice) else self.cells[rows].as_py()
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:  # bytes that are no UTF-8, the year 10000
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: column {self.name!r} cannot be read ({reason}).") from None


def arrow_class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Class names of the ClassLabel columns, as `datasets` writes them into the metadata; none without."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: list(map(str, kind["names"]))
            for name, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def check_class_names(found: Sequence[Mapping[str, list[str]]], where: str) -> None:
    """Raises UserError where one number means different classes in two of these tables; one without names is passed."""
    for first, second in itertools.combinations(found, 2):
        for name in first.keys() & second.keys():
            if first[name] != second[name]:
                raise UserError(
                    f"The class names of column {name!r} differ between {where}: {', '.join(first[name][:5])} and "
                    f"{', '.join(second[name][:5])}. Write the same names in the same order into each."
                )


def read_parquet(path: Path) -> Table:
    """The columns of a parquet file, of whatever types.

    Raises:
        UserError: it cannot be read, or two columns have one name.
    """
    try:
        content = pyarrow.parquet.ParquetFile(path).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())}).") from None
    names = content.column_names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has two columns {twice!r}. Column names must differ; rename one.")
    columns = {name: ArrowColumn(path, name, content.column(number)) for number, name in enumerate(names)}
    return Table(columns, arrow_class_names(content.schema))


# ------------------------------------------------------------------ files and folders
READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": read_parquet,
}


def _split_of(relative: Path) -> str | None:
    """The split that a file's name, else its folder's, stands for: `train-00000-of-00002.parquet` -> train."""
    words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def _merge(tables: list[Table]) -> Table:
    """The rows of several files of one split; a column that a file lacks is None there."""
    if len(tables) == 1:
        return tables[0]
    check_class_names([part.class_names for part in tables], "its files")
    names = dict.fromkeys(name for part in tables for name in part.columns)
    columns = {
        name: [cell for part in tables for cell in part.columns.get(name, [None] * part.num_rows)[:]] for name in names
    }
    return Table(columns, tables[0].class_names, any(part.untyped for part in tables))


def _read(files: list[Path]) -> Table:
    """The rows of the files of one split.

    Raises:
        UserError: a file cannot be read, or there is no row in any; one of several may be empty.
    """
    tables = [READERS[file.suffix.lower()](file) for file in files]
    merged = _merge([part for part in tables if part.num_rows] or tables[:1])
    if not merged.num_rows:
        header = f"only the columns {', '.join(merged.columns)}" if merged.columns else "it is empty"
        raise UserError(f"{files[0]} has no rows: {header}. Write one labelled text per row.")
    return merged


def read_files(path: Path) -> dict[str, Table]:
    """The tables of a file, which is one table whatever its name, or of a folder, whose files go by their names.

    Args:
        path: an existing file or folder.

    Raises:
        UserError: another kind of file, no data file in the folder, some that belong to no split, one in two formats.
    """
    kinds = ", ".join(READERS)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path} is none of the files that can be read: {kinds}.")
        return {"train": _read([path])}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise UserError(f"No data file in the folder {path}: it needs {kinds} files.")
    by_split: dict[str | None, list[Path]] = {}
    stems: dict[Path, Path] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file:
            raise UserError(f"{other} and {file} may be the same rows in two formats. Remove or rename one.")
    unnamed = by_split.pop(None, [])
    if unnamed and by_split:
        raise UserError(
            f"{unnamed[0]} belongs to no split, while {next(iter(by_split.values()))[0]} does. "
            "Put train, test or validation into every file name, or into none."
        )
    by_split = by_split or {"train": unnamed}
    return {str(split): _read(found) for split, found in by_split.items()}
