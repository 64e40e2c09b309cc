"""Read the rows of a dataset by its name, with every cell as written.

A name is a key of the table of known datasets, an id of the hub, docstrings/<task>, or a local file or folder:

    .jsonl .json   objects with a cell per column, one a line or all in one list
    .csv           a cell with a comma, a quotation mark or a line break stands in double quotes
    .tsv           no quoting: a quotation mark is a character like any other, as in GLUE
    .parquet       columns of any type
    a folder       such files, named train, test or validation; or the subsets that its README.md names (`configs:`)

Text is UTF-8, or UTF-16 or UTF-32 with its byte order mark. `cells.py` turns the cells into labels and texts.
"""

import csv
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.table import DATASETS, SPECS, DatasetSpec, find_spec
from utils.hub import Repository, hub_errors, nearest, shorten
from utils.script import UserError

if TYPE_CHECKING:
    import pyarrow

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF |= dict.fromkeys(VALIDATION_NAMES, "validation")


@dataclass(frozen=True)
class Table:
    """The rows of one split, by column."""

    columns: Mapping[str, Any]  # lists of cells, or Arrow's columns
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # integer column -> names of its classes

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def read(self, name: str, part: str = "data") -> list[Any]:
        """The cells of a column of a part as Python objects. Raises UserError if it is missing or unreadable."""
        if name not in self.columns:
            found = f"The {part} rows have no column {name!r}; columns: {', '.join(self.columns) or 'none'}"
            instead = " With --divide_train you need no test rows." if part == "test" else ""
            raise UserError(f"{found}. Name one: --text_column, --text_template, --label_column.{instead}")
        cells = self.columns[name]
        try:
            return list(cells) if isinstance(cells, list) else cells.to_pylist()
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, the year 10000
            raise UserError(f"Column {name!r} cannot be read ({shorten(str(error))}). Correct or remove it.") from None


@dataclass(frozen=True)
class Source:
    """The splits found under one dataset name, and their origin."""

    name: str
    tables: dict[str, Table]  # by split
    spec: DatasetSpec
    own: bool = False  # the user's own data: faulty rows are errors; in hub data they cause a warning


# ------------------------------------------------------------------ formats
def read_lines(path: Path, newline: str | None) -> Iterator[str]:
    """Yields the lines of a file, which end as `open` has it. Raises ValueError if it has another encoding."""
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        text = io.TextIOWrapper(file, encoding, newline=newline)
        try:
            for line in text:
                if "\0" in line:
                    raise ValueError("it holds zero bytes, so it is damaged")
                yield line
        except UnicodeDecodeError as error:
            found = f"{error.reason} at position {file.tell() - len(error.object) + error.start}"
            remedy = f"if it is text, convert: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > new{path.suffix}"
            raise ValueError(f"it is no {encoding!r} text: {found}; {remedy}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError for two equal keys; Python would silently keep the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"an object with the keys {', '.join(repr(name) for name, _ in pairs)}, two of them equal")
    return dict(pairs)


def _records(path: Path) -> Iterator[Any]:
    """Yields the items of a JSON list, or of one object a line."""
    lines = enumerate(read_lines(path, newline=None), 1)  # a raw U+2028 ends no line
    for number, line in lines:
        part = line + "".join(rest for _, rest in lines) if line.lstrip().startswith("[") else line
        try:
            found = json.loads(part, object_pairs_hook=_unique) if part.strip() else []
        except ValueError as error:  # also a number of thousands of digits
            raise ValueError(f"line {number}, {part.strip()[:60]!r}: {error}") from None
        yield from found if isinstance(found, list) else [found]


def _read_json(path: Path) -> Table:
    """Reads a list of objects, or one object a line; where an object lacks a key, the cell is missing."""
    columns: dict[str, list[Any]] = {}
    for row, record in enumerate(_records(path)):
        if not isinstance(record, dict):
            raise ValueError(f"row {row + 1}, {str(record)[:40]!r}, is not an object")
        columns |= {name: [None] * row for name in record if name not in columns}
        for name, cells in columns.items():
            cells.append(record.get(name))
    return Table(columns)


def _read_delimited(path: Path) -> Table:
    """Reads a header and rows with as many cells; cells stay strings."""
    csv.field_size_limit(2**31 - 1)  # the default is less than a long text
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    reader = csv.reader(read_lines(path, newline=""), strict=True, **options)
    rows = filter(None, reader)  # a blank line is no row
    try:
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header):
            raise ValueError(f"two columns have one name: {', '.join(header)}")
        if len(header) == 1 and re.search(r"[;|\t,]", header[0]):
            raise ValueError(f"its header {header[0]!r} is one cell. Separate cells by {reader.dialect.delimiter!r}")
        columns: dict[str, list[str]] = {name: [] for name in header}
        for cells in rows:
            if len(cells) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells under {len(header)} columns {header}")
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return Table(columns)


def arrow_table(content: "pyarrow.Table") -> Table:
    """The columns of an Arrow table, and the class names that `datasets` keeps in its metadata."""
    columns = {name: content.column(name) for name in content.column_names}
    try:
        features = json.loads((content.schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return Table(columns, {name: list(map(str, kind["names"])) for name, kind in classes.items()})
    except (KeyError, TypeError, ValueError, AttributeError):  # no metadata, or another library's
        return Table(columns)


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    return arrow_table(pyarrow.parquet.ParquetFile(path).read())


JSON_RULE = "Write one object a line, as pandas does with to_json(path, orient='records', lines=True), or one list."
READERS: dict[str, tuple[Callable[[Path], Table], str]] = {  # suffix -> reader and the format's rule
    ".jsonl": (_read_json, JSON_RULE),
    ".json": (_read_json, JSON_RULE),
    ".csv": (_read_delimited, "A cell with a comma, a quotation mark or a line break stands in double quotes."),
    ".tsv": (_read_delimited, "A .tsv has no quoting: write cells with a tab or a line break as .csv or .jsonl."),
    ".parquet": (_read_parquet, "Write it again, with different names for all columns."),
}


def _read_file(path: Path) -> Table:
    """The rows of one file. Raises UserError with the cause and the format's rule if it cannot be read."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is not in a readable format. Save it as {', '.join(READERS)}.")
    reader, rule = READERS[path.suffix.lower()]
    try:
        return reader(path)
    except Exception as error:  # each library has errors of its own
        raise UserError(f"{path} cannot be read: {shorten(str(error))}. {rule}") from error


# ------------------------------------------------------------------ files and folders
def read_files(files: Mapping[str, Sequence[Path]]) -> dict[str, Table]:
    """The rows of each split from its files; a file that lacks a column of the others gets missing cells."""
    tables = {split: [_read_file(file) for file in of_split] for split, of_split in files.items()}
    check_class_names(itertools.chain(*tables.values()))
    for split, read in tables.items():
        if not any(map(len, read)):
            found = f"only the columns {', '.join(read[0].columns)}" if read[0].columns else "it is empty"
            raise UserError(f"{files[split][0]} has no rows: {found}. Write one labelled text per row.")
    return {split: read[0] if len(read) == 1 else _joined(read) for split, read in tables.items()}


def check_class_names(tables: Iterable[Table]) -> None:
    """Raises UserError if a number stands for different classes in two of these tables."""
    known: dict[str, list[str]] = {}
    for name, classes in (item for table in tables for item in table.class_names.items()):
        if known.setdefault(name, classes) != classes:
            found = f"{', '.join(known[name][:5])} and {', '.join(classes[:5])}"
            raise UserError(f"The class names of column {name!r} differ between files: {found}. Write them alike.")


def _joined(tables: Sequence[Table]) -> Table:
    names = dict.fromkeys(name for table in tables for name in table.columns)
    cells = {name: [t.read(name) if name in t.columns else [None] * len(t) for t in tables] for name in names}
    class_names = dict(item for table in tables for item in table.class_names.items())
    return Table({name: list(itertools.chain(*found)) for name, found in cells.items()}, class_names)


def _files_of_folder(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split: the last word train, test or validation in the path."""
    by_split: dict[str, list[Path]] = {}
    stems: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if file.suffix == ".arrow":
            convert = f"datasets.load_from_disk({str(file.parent)!r}).to_parquet('train.parquet')"
            raise UserError(f"{folder} was written by save_to_disk. Write each split elsewhere: {convert}")
        if file.is_dir() and file.is_symlink():
            raise UserError(f"{file} is a link to a folder, and the loader follows none. Copy the folder, or name it.")
        if file.suffix.lower() not in READERS or file.is_dir():
            continue
        words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
        splits = [SPLIT_OF[word] for word in words if word in SPLIT_OF]
        by_split.setdefault(splits[-1] if splits else "", []).append(file)
        if (other := stems.setdefault(file.with_suffix(""), file)) != file:
            raise UserError(f"{other} and {file} may be the same rows in two formats. Remove or rename one.")
    if not by_split:
        raise UserError(f"No data file in the folder {folder}: it needs {', '.join(READERS)} files.")
    if "" in by_split and len(by_split) > 1:
        found = f"{by_split[''][0]} belongs to no split, while other files do"
        raise UserError(f"{found}. Put train, test or validation into every file name, or into none.")
    return {split or "train": files for split, files in by_split.items()}


def _files_of_subset(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    """The files, by split, of a subset that README.md defines."""
    import datasets

    names = datasets.get_dataset_config_names(str(folder))
    chosen = subset or datasets.get_dataset_default_config_name(str(folder))
    if chosen not in names:
        found = f"{folder} has the subsets {', '.join(names)}{f', not {subset!r}' if subset else ''}"
        raise UserError(f"{found}. Name one: --dataset_name {folder}:{names[0]}")
    files = datasets.load_dataset_builder(str(folder), chosen).config.data_files
    return {str(split): [Path(file) for file in of_split] for split, of_split in files.items()}


def find_files(path: Path, subset: str | None = None) -> dict[str, list[Path]]:
    """The files by split: of a folder, of its subset, or a single file as `train`."""
    if path.is_file():
        return {"train": [path]}
    card = path / "README.md"
    head = card.read_text(encoding="utf-8-sig", errors="replace").split("\n---")[0] if card.is_file() else ""
    has_subsets = head.startswith("---") and "\nconfigs:" in head  # not in the words below the settings
    if subset and not has_subsets:
        raise UserError(f"{path} has no subsets: its README.md has no `configs:`. Leave out :{subset}.")
    with hub_errors(Repository(str(path), "Dataset", (), "a file of it")):
        return _files_of_subset(path, subset) if has_subsets else _files_of_folder(path)


# ------------------------------------------------------------------ names
def find_source(name: str, revision: str | None = None, datasets_dir: Path | None = None) -> Source:
    """All splits of the dataset called `name`; a key of the table wins over a folder of the same name."""
    spec = find_spec(name)
    copy = (datasets_dir or Path()) / spec.key.replace("/", "__")
    has_copy = datasets_dir is not None and (spec.is_known or copy.is_dir())
    folder, _, subset = name.rpartition(":")
    own = not spec.is_known and (os.path.exists(name) or os.path.isdir(folder))
    if revision is not None and (has_copy or own or name.startswith("docstrings/")):
        raise UserError(f"--dataset_revision {revision} needs the hub; local data has no revisions. Leave it out.")
    if name.startswith("docstrings/"):
        from utils.data.docstrings import load_task  # it parses the installed packages: only when asked for

        parts = load_task(name.removeprefix("docstrings/")).items()
        return Source(name, {part: Table({"text": texts, "label": labels}) for part, (texts, labels) in parts}, spec)
    if has_copy:
        return Source(name, read_files(_files_of_copy(copy)), spec)
    if own:
        files = find_files(Path(name)) if os.path.exists(name) else find_files(Path(folder), subset)
        return Source(name, read_files(files), spec, own=True)
    is_path = Path(name).suffix.lower() in READERS or name.startswith((".", "/", "~"))
    if not spec.is_known and (is_path or name.count("/") != 1):
        known = [spec.key for spec in SPECS]
        found = f"No file, folder or known dataset is called {name!r} (in {Path.cwd()}).{nearest(name, known)}"
        raise UserError(f"{found} Known: {', '.join(known)}, docstrings/<task>, and ids of the hub (user/name).")
    return Source(name, _hub_tables(spec, revision or spec.revision), spec)


def _files_of_copy(copy: Path) -> dict[str, list[Path]]:
    files = [copy / f"{split}.parquet" for split in ("train", "test", "validation")]
    found = {path.stem: [path] for path in files if path.is_file()}
    if not found:
        fault = f"No copy in --datasets_dir: {files[0].absolute()} is missing"
        raise UserError(f"{fault}. Put the hub's rows there, or leave out --datasets_dir (NTPS_DATASETS_DIR).")
    return found


def _hub_tables(spec: DatasetSpec, revision: str | None) -> dict[str, Table]:
    import datasets

    instead = "a local file or docstrings/<task>; known: docs/models_and_data.md"
    with hub_errors(Repository(spec.hub_id, "Dataset", () if spec.is_known else tuple(DATASETS), instead, revision)):
        loaded = datasets.load_dataset(spec.hub_id, spec.config, data_files=spec.data_files, revision=revision)
    return {str(split): arrow_table(rows.with_format("arrow")[:]) for split, rows in loaded.items()}
