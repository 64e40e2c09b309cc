"""Read the rows of a dataset by its name; every cell stays as it is written.

A name is a key of the table of known datasets, an id of the hub, docstrings/<task>, or a local file or folder:

    .jsonl .json   objects with a cell per column, one a line or all in one list
    .csv           a cell with a comma, a quotation mark or a line break stands in double quotes
    .tsv           no quoting: a quotation mark is a character like any other, as in GLUE
    .parquet       columns of any type
    a folder       such files, named train, test or validation; or the subsets that its README.md names (`configs:`);
                   or the output of `save_to_disk` of the library datasets

Text is UTF-8, or UTF-16 or UTF-32 with its byte order mark. `cells.py` turns the cells into labels and texts.
"""

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
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

    def read(self, name: str) -> list[Any]:
        """The cells of a column as Python objects. Raises UserError if the column is missing or cannot be read."""
        if name not in self.columns:
            found = f"no column {name!r}; columns: {', '.join(self.columns) or 'none'}"
            raise UserError(f"The data have {found}. Name one: --text_column, --text_template, --label_column.")
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
    spec: DatasetSpec | None = None
    own: bool = False  # the user's own data: faulty rows are errors; in hub data they are left out with a warning


# ------------------------------------------------------------------ formats
def decode(path: Path) -> str:
    """The text of a file. Raises UserError if it cannot be read, has another encoding or holds zero bytes."""
    try:
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"{path} is not {error.encoding}: byte {error.start}, line {line}"
        raise UserError(f"{found}. Convert it: iconv -f latin1 -t utf-8 {path}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line} holds zero bytes: the file is damaged. Write it again.")
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; refuses two equal keys, of which Python would silently keep the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"an object with the keys {', '.join(repr(name) for name, _ in pairs)}, two of them equal")
    return dict(pairs)


def _read_json(path: Path) -> Table:
    """Reads a list of objects, or one object a line; a key that an object lacks is a missing cell."""
    text, records = decode(path), list[Any]()
    parts = [text] if text.lstrip().startswith("[") else io.StringIO(text, newline=None)  # a raw U+2028 ends no line
    for number, part in enumerate(parts, 1):
        try:
            found = json.loads(part, object_pairs_hook=_unique) if part.strip() else []
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            fault = f"{path}, line {number} is not readable JSON ({error}): {part.strip()[:60]!r}"
            raise UserError(f"{fault}. Write one object a line, or one list of objects.") from None
        records += found if isinstance(found, list) else [found]
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {row}: {str(record)[:40]!r} is not an object. Write one object a row.")
    if len(records) == 1 and all(isinstance(cell, dict | list) for cell in records[0].values()):
        fault = f"{path} is one object with the keys {', '.join(map(repr, list(records[0])[:5]))}, not one object a row"
        raise UserError(f"{fault}. pandas writes one a row with to_json(path, orient='records', lines=True).")
    names = dict.fromkeys(name for record in records for name in record)
    return Table({name: [record.get(name) for record in records] for name in names})


def _read_delimited(path: Path) -> Table:
    """Reads a header and rows with as many cells; every cell stays the written string."""
    csv.field_size_limit(2**31 - 1)  # the default is less than a long text
    stream = io.StringIO(decode(path), newline="")
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(stream, strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
        advice = "a .tsv has no quoting: write cells with a tab or a line break as .csv or .jsonl."
    else:
        reader = csv.reader(stream, strict=True)
        advice = "a cell with a comma, a quotation mark or a line break stands in double quotes."
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]  # a blank line is no row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not {path.suffix[1:]} ({error}): {advice}") from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of one name: {', '.join(header)}. Rename one.")
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} cells under {len(header)} columns {header}; {advice}")
    return Table({name: [cells[i] for _, cells in lines[1:]] for i, name in enumerate(header)})


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

    try:
        return arrow_table(pyarrow.parquet.ParquetFile(path).read())
    except (OSError, KeyError, pyarrow.ArrowException) as error:  # KeyError: two columns of one name
        raise UserError(f"{path} cannot be read as parquet ({shorten(str(error))}).") from None


READERS: dict[str, Callable[[Path], Table]] = dict.fromkeys((".jsonl", ".json"), _read_json)
READERS |= dict.fromkeys((".csv", ".tsv"), _read_delimited) | {".parquet": _read_parquet}


# ------------------------------------------------------------------ files and folders
def check_class_names(tables: Iterable[Table], where: str) -> None:
    """Raises UserError if one number means different classes in two of these tables."""
    known: dict[str, list[str]] = {}
    for name, classes in (item for table in tables for item in table.class_names.items()):
        if known.setdefault(name, classes) != classes:
            found = f"{', '.join(known[name][:5])} and {', '.join(classes[:5])}"
            raise UserError(f"The class names of column {name!r} differ between {where}: {found}. Write them alike.")


def _read(files: Sequence[Path]) -> Table:
    """The rows of the files of one split; a file without some column gets missing cells for it."""
    if unknown := [file for file in files if file.suffix.lower() not in READERS]:
        raise UserError(f"{unknown[0]} has no readable format. Readable are {', '.join(READERS)}.")
    tables = [READERS[file.suffix.lower()](file) for file in files]
    check_class_names(tables, "its files")
    full = [table for table in tables if len(table)]
    if not full:
        found = f"only the columns {', '.join(tables[0].columns)}" if tables[0].columns else "it is empty"
        raise UserError(f"{files[0]} has no rows: {found}. Write one labelled text per row.")
    if len(full) == 1:
        return full[0]
    names = dict.fromkeys(name for table in full for name in table.columns)
    cells = {name: [t.read(name) if name in t.columns else [None] * len(t) for t in full] for name in names}
    return Table({name: list(itertools.chain(*found)) for name, found in cells.items()}, full[0].class_names)


def _read_folder(folder: Path) -> dict[str, Table]:
    """The tables of the data files of a folder; the last word train, test or validation of a path gives the split."""
    by_split: dict[str, list[Path]] = {}
    stems: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_dir() and file.is_symlink() and not is_hidden:
            raise UserError(f"{file} is a link to a folder; links are not followed. Copy the folder, or name it.")
        if file.suffix.lower() not in READERS or is_hidden or file.is_dir():
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
    return {split or "train": _read(files) for split, files in by_split.items()}


def _read_saved(folder: Path, saved: list[Path]) -> dict[str, Table]:
    """The tables of splits that `save_to_disk` wrote into these folders."""
    import datasets

    names = ["train" if path == folder else path.name for path in saved]
    if len(set(names)) < len(names):
        raise UserError(f"{folder} holds several saved datasets. Name the folder of one, such as {saved[0].parent}.")
    rows = [datasets.load_from_disk(str(path)).with_format("arrow")[:] for path in saved]
    return dict(zip(names, map(arrow_table, rows), strict=True))


def _read_subset(folder: Path, subset: str | None) -> dict[str, Table]:
    """The tables of a subset that README.md defines."""
    import datasets

    names = datasets.get_dataset_config_names(str(folder))
    chosen = subset or datasets.get_dataset_default_config_name(str(folder))
    if chosen not in names:
        found = f"{folder} has the subsets {', '.join(names)}{f', not {subset!r}' if subset else ''}"
        raise UserError(f"{found}. Name one: --dataset_name {folder}:{names[0]}")
    files = datasets.load_dataset_builder(str(folder), chosen).config.data_files
    return {str(split): _read([Path(file) for file in of_split]) for split, of_split in files.items()}


def read_files(path: Path, subset: str | None = None) -> dict[str, Table]:
    """The tables of a file (always one, `train`), of a folder or of a subset of a folder, by split."""
    if path.is_file():
        return {"train": _read([path])}
    card = path / "README.md"
    head = card.read_text(encoding="utf-8-sig", errors="replace").split("\n---")[0] if card.is_file() else ""
    has_subsets = head.startswith("---") and re.search(r"^configs\s*:", head, re.MULTILINE)
    if subset and not has_subsets:
        raise UserError(f"{path} has no subsets: its README.md has no `configs:`. Leave out :{subset}.")
    saved = [file.parent for file in sorted(path.rglob("state.json")) if (file.parent / "dataset_info.json").is_file()]
    with hub_errors(Repository(str(path), "Dataset", (), "a file of it")):
        if has_subsets:
            return _read_subset(path, subset)
        return _read_saved(path, saved) if saved else _read_folder(path)


# ------------------------------------------------------------------ names
def find_source(name: str, revision: str | None = None, datasets_dir: Path | None = None) -> Source:
    """All splits of the dataset called `name`; a key of the table wins over a folder of the same name."""
    if name.startswith("docstrings/"):
        from utils.data.docstrings import load_task  # it parses the installed packages: only when asked for

        parts = load_task(name.removeprefix("docstrings/"))
        return Source(name, {part: Table({"text": texts, "label": labels}) for part, (texts, labels) in parts.items()})
    spec = DATASETS.get(name)
    copy = datasets_dir / (spec.key if spec else name).replace("/", "__") if datasets_dir else None
    if copy and (spec or copy.is_dir()):
        if revision is not None:
            raise UserError(f"--dataset_revision {revision} needs the hub; a copy in --datasets_dir has no revisions.")
        return _copied_source(name, spec, copy)
    path, (folder, _, subset) = Path(name), name.rpartition(":")
    if not spec and os.path.exists(name):
        return Source(name, read_files(path), own=True)
    if not spec and os.path.isdir(folder):
        return Source(name, read_files(Path(folder), subset), own=True)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"The file or folder {path.absolute()} does not exist. Correct --dataset_name.")
    if not spec and "/" not in name:
        known = [spec.key for spec in SPECS]
        found = f"No dataset is called {name!r}.{nearest(name, known)} Known: {', '.join(known)}, docstrings/<task>"
        raise UserError(f"{found}. An id of the hub (user/name), a local file or a folder works too.")
    return _hub_source(name, spec, revision)


def _hub_source(name: str, spec: DatasetSpec | None, revision: str | None) -> Source:
    """A dataset of the hub; a `name` outside the table may be `id:config`."""
    import datasets

    hub_id, _, config = (spec.hub_id, "", spec.config) if spec else name.partition(":")
    revision = revision or (spec.revision if spec else None)
    instead = "a local file or docstrings/<task>; known: python -m utils.data.load"
    options = {"name": config or None, "data_files": spec.data_files if spec else None}
    with hub_errors(Repository(hub_id, "Dataset", tuple(DATASETS), instead, revision)):
        try:
            loaded = datasets.load_dataset(hub_id, revision=revision, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or revision is not None:
                raise
            loaded = datasets.load_dataset(hub_id, revision=PARQUET_BRANCH, **options)
    return Source(name, {str(split): arrow_table(rows.with_format("arrow")[:]) for split, rows in loaded.items()}, spec)


def _copied_source(name: str, spec: DatasetSpec | None, copy: Path) -> Source:
    """A dataset from `<key with / as __>/{train,test,validation}.parquet`, read as if it came from the hub."""
    files = [copy / f"{split}.parquet" for split in ("train", "test", "validation")]
    tables = {path.stem: _read([path]) for path in files if path.is_file()}
    if not tables:
        found = f"No copy of {name} in --datasets_dir: {files[0].absolute()} is missing"
        raise UserError(f"{found}. Put the hub's rows there, or leave out --datasets_dir (NTPS_DATASETS_DIR).")
    if spec and spec.class_names:  # files without the metadata of `datasets` hold numbers
        names = {spec.label_column: list(spec.class_names)}
        tables = {split: Table(rows.columns, {**names, **rows.class_names}) for split, rows in tables.items()}
    return Source(name, tables, spec)
