"""A dataset's tables by its name (hub, local file or folder, local copy, docstring task), and their text and label."""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data.cells import holds_text, render_column
from utils.data.files import READERS, Table, arrow_table, read_files
from utils.data.table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
from utils.script import UserError
from utils.settings import Data


@dataclass(frozen=True)
class Source:
    """Everything found under one dataset name."""

    name: str
    splits: dict[str, Table]
    spec: DatasetSpec | None = None
    own: bool = False  # the user can mend the rows: faults are errors; elsewhere such rows are left out with a warning
    copy: Path | None = None  # folder of a local copy of a dataset of the hub


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

        parts = {split: load_task(name.removeprefix("docstrings/"), split) for split in ("train", "test")}
        return Source(
            name, {split: Table({"text": texts, "label": labels}) for split, (texts, labels) in parts.items()}
        )
    if datasets_dir and (name in DATASETS or _copy_folder(datasets_dir, name).is_dir()):
        if revision is not None:
            raise UserError(f"--dataset_revision {revision} is of the hub; a copy in --datasets_dir has no revisions.")
        return _copied_source(name, datasets_dir)
    if name in DATASETS:
        return _hub_source(name, DATASETS[name], revision)
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
    repository = Repository(hub_id, "Dataset", tuple(DATASETS), instead, revision, "--dataset_revision")
    options = {"name": config or None, "data_files": spec.data_files if spec else None}
    with hub_errors(repository):
        try:
            loaded = datasets.load_dataset(hub_id, revision=revision, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or revision is not None:
                raise
            loaded = datasets.load_dataset(hub_id, revision=PARQUET_BRANCH, **options)
    return Source(
        name, {str(split): arrow_table(name, rows.with_format("arrow")[:]) for split, rows in loaded.items()}, spec
    )


def _copy_folder(folder: Path, name: str) -> Path:
    """The folder of the copy of a dataset: its key in the table, else its id, with `/` as `__`."""
    key = DATASETS[name].key if name in DATASETS else name
    return folder / key.replace("/", "__")


def _copied_source(name: str, folder: Path) -> Source:
    """A dataset from `<key with / as __>/{train,test,validation}.parquet`, read as if it came from the hub."""
    spec, copy = DATASETS.get(name), _copy_folder(folder, name)
    if not folder.is_dir():
        raise UserError(f"--datasets_dir: there is no folder {folder.absolute()}. It holds one folder per dataset.")
    files = {split: copy / f"{split}.parquet" for split in ("train", "test", "validation")}
    splits = {split: read_files(path)["train"] for split, path in files.items() if path.is_file()}
    if not splits:
        present = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise UserError(
            f"No copy of {name} in --datasets_dir {folder}: {copy.name}/train.parquet is missing; copies: {present}. "
            "Put the hub's rows there, or leave out --datasets_dir (NTPS_DATASETS_DIR) to load them from the hub."
        )
    if spec and spec.class_names:  # files without the metadata of `datasets` hold numbers
        names = {spec.label_column: list(spec.class_names)}
        splits = {split: Table(rows.columns, {**names, **rows.class_names}) for split, rows in splits.items()}
    return Source(name, splits, spec, copy=copy)


# ------------------------------------------------------------------ columns
def read_column(source: Source, part: Table, name: str, flag: str) -> list[Any]:
    """One column; `flag` names another one. Raises UserError where there is no such column."""
    if name not in part.columns:
        present = ", ".join(part.columns) or "none"
        raise UserError(f"{source.name} has no column {name!r}; columns: {present}. Name one with {flag}.")
    return list(part.columns[name][:])


def label_column_name(settings: Data, source: Source, part: Table) -> str:
    """The label column: as asked for, as the table of datasets has it, or `label` / `labels`."""
    chosen = settings.label_column or (source.spec.label_column if source.spec else None)
    return chosen or next((name for name in ("label", "labels") if name in part.columns), "label")


def text_pieces(settings: Data, source: Source, part: Table, label: str) -> list[tuple[str, str | None]]:
    """A text as pieces of (literal, column behind it): of the template, of one column, or of the only text column.

    Raises:
        UserError: two ways are asked for, the template is malformed, or no column is the evident one.
    """
    if settings.text_column and settings.text_template:
        raise UserError("--text_column and --text_template exclude each other: give one of them.")
    if settings.text_column:
        return [("", settings.text_column)]
    template = settings.text_template or (source.spec.text_template if source.spec else None)
    if template is not None:
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"--text_template {template!r} is malformed ({error}).") from None
        names = [name for _, name, _, _ in parsed if name is not None]
        if not names or "" in names or any(form or conversion for _, _, form, conversion in parsed):
            raise UserError(
                f'--text_template {template!r} must name columns in braces, like "{{question}} {{choices}}".'
            )
        return [(literal, name) for literal, name, _, _ in parsed]
    if "text" in part.columns:
        return [("", "text")]
    candidates = [name for name in part.columns if name != label and holds_text(part.columns[name][:])]
    if len(candidates) != 1:
        raise UserError(
            f"Which column of {source.name} is the text? Columns: {', '.join(part.columns) or 'none'}. "
            "Name one with --text_column, or several with --text_template."
        )
    return [("", candidates[0])]


def join_texts(source: Source, part_name: str, part: Table, pieces: list[tuple[str, str | None]]) -> list[str]:
    """One text per row; empty where every column is blank, whatever the template puts around them."""
    flag = "--text_column or --text_template"
    names = [name for _, name in pieces if name is not None]
    columns = [render_column(source.name, part_name, name, read_column(source, part, name, flag)) for name in names]
    texts = []
    for cells in zip(*columns, strict=True):
        rest = iter(cells)
        joined = "".join(literal + (next(rest) if name is not None else "") for literal, name in pieces)
        texts.append(joined if any(cell.strip() for cell in cells) else "")
    return texts
