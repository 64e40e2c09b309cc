"""Tables of rows by the name of a dataset, every cell as it is written.

A name is a key of the table of known datasets, an id of the hub, docstrings/<task>, or a local file or folder:

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
from utils.script import UserError

if TYPE_CHECKING:
    import pyarrow

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(VALIDATION_NAMES, "validation")
# the byte order mark of UTF-32 starts with that of UTF-16 and goes first
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Table:
    """The rows of one split, by column."""

    columns: Mapping[str, Any]  # lists of cells, or Arrow's columns
    class_names: Mapping[str, list[str]] = field(default_factory=dict)  # of integer columns whose classes have names

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def read(self, name: str) -> list[Any]:
        """The cells of a column as Python objects. Raises UserError where Arrow's cannot become such."""
        cells = self.columns[name]
        try:
            return list(cells) if isinstance(cells, list) else cells.to_pylist()
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, the year 10000
            raise UserError(f"Column {name!r} cannot be read ({one_line(error)}). Repair or remove it.") from None


@dataclass(frozen=True)
class Source:
    """Everything found under one dataset name."""

    name: str
    tables: dict[str, Table]  # by split
    spec: DatasetSpec | None = None
    own: bool = False  # the user can mend the rows: faults are errors; elsewhere such rows are left out with a warning


def one_line(error: Exception) -> str:
    """A library's message without its line breaks."""
    return " ".join(str(error).split())


# ------------------------------------------------------------------ formats
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
        raise UserError(
            f"{path} is not {encoding}: byte {error.start}, line {line}. Convert it: iconv -f latin1 -t utf-8 {path}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{path}, line {line} holds zero bytes: the file is damaged, or UTF-16 without a byte order mark: "
            f"iconv -f UTF-16LE -t utf-8 {path}"
        )
    return text.lstrip("\ufeff")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones Python would keep the last in silence."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"an object with the keys {', '.join(repr(name) for name, _ in pairs)}, two of them equal")
    return dict(pairs)


def _parse(where: str, text: str) -> Any:
    """The value of a JSON text. Raises UserError where it is none, or has two equal keys or thousands of digits."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON that can be read ({error}): {text.strip()[:60]!r}. Write one object a line, such as "
            '{"text": "...", "label": "..."}, or one list of objects.'
        ) from None


def _read_json(path: Path) -> Table:
    """A list of objects, or one object a line; a key that an object lacks is a missing cell."""
    text = decode(path)
    if text.lstrip().startswith("["):
        records = _parse(str(path), text)
    else:
        lines = enumerate(io.StringIO(text, newline=None), 1)  # a raw U+2028 ends no line
        records = [_parse(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, row {row}: {str(record)[:40]!r} is not an object like {{"text": ..., "label": ...}}.'
            )
    if len(records) == 1 and records[0] and all(isinstance(cell, dict | list) for cell in records[0].values()):
        raise UserError(
            f"{path} is one object with the keys {', '.join(map(repr, list(records[0])[:5]))}, and not one object a "
            "row. pandas writes one object a line with to_json(path, orient='records', lines=True)."
        )
    names = dict.fromkeys(name for record in records for name in record)
    return Table({name: [record.get(name) for record in records] for name in names})


def _read_delimited(path: Path) -> Table:
    """A header and rows of as many cells; every cell stays the string that is written."""
    csv.field_size_limit(2**31 - 1)  # the default is less than a long text
    kind = path.suffix[1:].lower()
    if kind == "tsv":
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        advice = "a .tsv has no quoting: write cells with a tab or a line break as .csv or .jsonl."
    else:
        dialect = {}
        advice = "a cell with a comma, a quotation mark or a line break stands in double quotes."
    reader = csv.reader(io.StringIO(decode(path), newline=""), strict=True, **dialect)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]  # a blank line is no row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not {kind} ({error}): {advice}") from None
    header = [name.strip(" \t\ufeff") for name in lines[0][1]] if lines else []
    for number, cells in lines:
        if len(cells) != len(header) or len(set(header)) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(cells)} cells under {len(header)} columns {header}. "
                f"Column names must differ; {advice}"
            )
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
        raise UserError(f"{path} cannot be read as parquet ({one_line(error)}).") from None


READERS: dict[str, Callable[[Path], Table]] = dict.fromkeys((".jsonl", ".json"), _read_json)
READERS |= dict.fromkeys((".csv", ".tsv"), _read_delimited) | {".parquet": _read_parquet}


# ------------------------------------------------------------------ files and folders
def check_class_names(tables: Sequence[Table], where: str) -> None:
    """Raises UserError where one number means different classes in two of these tables; one without names is passed."""
    for first, second in itertools.combinations([table.class_names for table in tables], 2):
        for name in first.keys() & second.keys():
            if first[name] != second[name]:
                raise UserError(
                    f"The class names of column {name!r} differ between {where}: {', '.join(first[name][:5])} and "
                    f"{', '.join(second[name][:5])}. Write the same names in the same order into each."
                )


def _read(files: Sequence[Path]) -> Table:
    """The rows of the files of one split; a column that a file lacks is missing cells there."""
    if unknown := [file for file in files if file.suffix.lower() not in READERS]:
        raise UserError(f"{unknown[0]} is none of the files that can be read: {', '.join(READERS)}.")
    tables = [READERS[file.suffix.lower()](file) for file in files]
    check_class_names(tables, "its files")
    full = [table for table in tables if len(table)]
    if not full:
        header = f"only the columns {', '.join(tables[0].columns)}" if tables[0].columns else "it is empty"
        raise UserError(f"{files[0]} has no rows: {header}. Write one labelled text per row.")
    if len(full) == 1:
        return full[0]
    columns: dict[str, list[Any]] = {name: [] for table in full for name in table.columns}
    for table in full:
        for name, cells in columns.items():
            cells.extend(table.read(name) if name in table.columns else [None] * len(table))
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
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file:
            raise UserError(f"{other} and {file} may be the same rows in two formats. Remove or rename one.")
    unnamed = by_split.pop(None, [])
    if unnamed and by_split:
        raise UserError(
            f"{unnamed[0]} belongs to no split, while {next(iter(by_split.values()))[0]} does. "
            "Put train, test or validation into every file name, or into none."
        )
    return {str(split): _read(found) for split, found in (by_split or {"train": unnamed}).items()}


def _read_by_library(folder: Path, saved: Sequence[Path], subset: str | None) -> dict[str, Table]:
    """The tables of splits that `save_to_disk` wrote, or of the subset whose files README.md names."""
    import datasets

    if saved:
        names = ["train" if path == folder else path.name for path in saved]
        rows = [datasets.load_from_disk(str(path)).with_format("arrow")[:] for path in saved]
        return dict(zip(names, map(arrow_table, rows), strict=True))
    names = datasets.get_dataset_config_names(str(folder))
    chosen = subset or datasets.get_dataset_default_config_name(str(folder))
    if chosen not in names:
        raise UserError(
            f"{folder} has the subsets {', '.join(names)}{f', not {subset!r}' if subset else ''}. Name one: "
            f"--dataset_name {folder}:{names[0]}"
        )
    files = datasets.load_dataset_builder(str(folder), chosen).config.data_files
    return {str(split): _read([Path(file) for file in found]) for split, found in files.items()}


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
    saved = [file.parent for file in sorted(path.rglob("state.json")) if (file.parent / "dataset_info.json").is_file()]
    card = path / "README.md"
    head = card.read_text(encoding="utf-8-sig", errors="replace").split("\n---")[0] if card.is_file() else ""
    has_subsets = head.startswith("---") and re.search(r"^configs\s*:", head, re.MULTILINE)
    if saved or has_subsets:
        from utils.hub import Repository, hub_errors

        with hub_errors(Repository(str(path), "Dataset", (), "a file of it")):
            return _read_by_library(path, saved, subset)
    if subset:
        raise UserError(f"{path} has no subsets: its README.md has no `configs:`. Leave out :{subset}.")
    return _read_by_name(path)


# ------------------------------------------------------------------ names
def find_source(name: str, revision: str | None = None, datasets_dir: Path | None = None) -> Source:
    """All splits of the dataset called `name`; a key of the table goes before a folder of the same name.

    Args:
        name: key of the table, id of the hub, local file or folder, or docstrings/<task>.
        revision: branch, tag or commit of a dataset of the hub.
        datasets_dir: folder of local copies; the datasets of the table are then never sought on the hub.

    Raises:
        UserError: no such key, file, folder or dataset of the hub, or one that cannot be read.
    """
    if name.startswith("docstrings/"):
        from utils.data.docstrings import load_task  # it parses the installed packages: only when asked for

        parts = load_task(name.removeprefix("docstrings/"))
        return Source(name, {part: Table({"text": texts, "label": labels}) for part, (texts, labels) in parts.items()})
    spec = DATASETS.get(name)
    copy = datasets_dir / (spec.key if spec else name).replace("/", "__") if datasets_dir else None
    if copy and (spec or copy.is_dir()):
        if revision is not None:
            raise UserError(f"--dataset_revision {revision} is of the hub; a copy in --datasets_dir has no revisions.")
        return _copied_source(name, spec, copy)
    if spec:
        return _hub_source(name, spec, revision)
    path, (folder, _, subset) = Path(name), name.rpartition(":")
    if path.exists():
        return Source(name, read_files(path), own=True)
    if folder and Path(folder).is_dir():
        return Source(name, read_files(Path(folder), subset), own=True)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"There is no file or folder {path.absolute()}.")
    if "/" not in name:
        from utils.hub import nearest

        known = [spec.key for spec in SPECS]
        raise UserError(
            f"There is no dataset {name!r}.{nearest(name, known)} Known: {', '.join(known)}, docstrings/<task>; "
            "or an id of the hub (user/name), or a local file or folder."
        )
    return _hub_source(name, None, revision)


def _hub_source(name: str, spec: DatasetSpec | None, revision: str | None) -> Source:
    """A dataset of the hub; `name` may be `id:config` where it is not in the table."""
    import datasets

    from utils.hub import Repository, hub_errors

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
    files = {split: copy / f"{split}.parquet" for split in ("train", "test", "validation")}
    tables = {split: read_files(path)["train"] for split, path in files.items() if path.is_file()}
    if not tables:
        present = ", ".join(sorted({path.parent.name for path in copy.parent.glob("*/*.parquet")})) or "none"
        raise UserError(
            f"No copy of {name} in --datasets_dir: {files['train'].absolute()} is missing; copies: {present}. "
            "Put the hub's rows there, or leave out --datasets_dir (NTPS_DATASETS_DIR) to load them from the hub."
        )
    if spec and spec.class_names:  # files without the metadata of `datasets` hold numbers
        names = {spec.label_column: list(spec.class_names)}
        tables = {split: Table(rows.columns, {**names, **rows.class_names}) for split, rows in tables.items()}
    return Source(name, tables, spec)
