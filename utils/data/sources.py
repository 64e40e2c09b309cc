"""Where the rows of a dataset come from: the hub, a local file or folder, the docstring tasks.

Every source ends as a `Source`: one `Table` of columns per split, nothing encoded, dropped or divided yet; that is
`data.py`. Local files are read in `files.py`. Nothing from a hub is ever executed: datasets with a loading script are
refused by the library itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from utils.data.files import READERS, VALIDATION_NAMES, Table, read_files
from utils.data.table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
from utils.hub import Repository, hub_errors, nearest
from utils.script import UserError

__all__ = ["VALIDATION_NAMES", "Source", "Table", "copied_source", "find_source"]


@dataclass(frozen=True)
class Source:
    """Everything found under one dataset name."""

    name: str
    splits: dict[str, Table]
    spec: DatasetSpec | None = None
    own: bool = False  # the user can mend the rows: faults are errors; elsewhere such rows are left out with a warning
    copy: Path | None = None  # folder of a local copy of a dataset of the hub


# ------------------------------------------------------------------ the hub
def _load_hub(
    hub_id: str, config: str | None, revision: str | None, data_files: Mapping[str, str] | None = None
) -> datasets.DatasetDict:
    """All splits of a dataset of the hub; no code of it is executed.

    Raises:
        UserError: unknown, gated, offline, no such revision or configuration, no data file that can be read.
    """
    instead = "a local file or docstrings/<task>; known: python -m utils.data.load"
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


# ------------------------------------------------------------------ local copies of hub datasets
COPY_SPLITS = ("train", "test", "validation")


def copy_folder(folder: Path, name: str) -> Path:
    """Where the copy of a dataset lies: under its key in the table, else under its id, with `/` as `__`."""
    key = DATASETS[name].key if name in DATASETS else name
    return folder / key.replace("/", "__")


def copied_source(name: str, folder: Path) -> Source:
    """A dataset from its local copy, read as if it came from the hub: template, label, split rule, class names.

    Args:
        name: key or hub id of the table, or the id of any other dataset.
        folder: holds `<key with / as __>/{train,test,validation}.parquet` in the hub's own columns.

    Raises:
        UserError: no such folder, no copy in it, a file that cannot be read or holds no row.
    """
    spec, place = DATASETS.get(name), copy_folder(folder, name)
    if not folder.is_dir():
        raise UserError(f"--datasets_dir: there is no folder {folder.absolute()}. It holds one folder per dataset.")
    files = {split: place / f"{split}.parquet" for split in COPY_SPLITS}
    files = {split: path for split, path in files.items() if path.is_file()}
    if not files:
        present = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise UserError(
            f"No copy of {name} in --datasets_dir {folder}: {place.name}/train.parquet is missing; copies: {present}. "
            "Put the hub's rows there, or leave out --datasets_dir (NTPS_DATASETS_DIR) to load them from the hub."
        )
    splits = {split: read_files(path)["train"] for split, path in files.items()}
    if spec and spec.class_names:  # files without the metadata of `datasets` hold numbers
        names = {spec.label_column: list(spec.class_names)}
        splits = {
            split: Table(rows.columns, {**names, **rows.class_names}, rows.untyped) for split, rows in splits.items()
        }
    return Source(name, splits, spec, copy=place)


def _docstrings_source(name: str) -> Source:
    from utils.data.docstrings import load_task  # it parses the installed packages: only when asked for

    parts = {split: load_task(name.removeprefix("docstrings/"), split) for split in ("train", "test")}
    return Source(name, {split: Table({"text": texts, "label": labels}) for split, (texts, labels) in parts.items()})


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
        return _docstrings_source(name)
    if datasets_dir and (name in DATASETS or copy_folder(datasets_dir, name).is_dir()):
        if revision is not None:
            raise UserError(f"--dataset_revision {revision} is of the hub; a copy in --datasets_dir has no revisions.")
        return copied_source(name, datasets_dir)
    if name in DATASETS:
        return _hub_source(name, DATASETS[name], revision)
    path = Path(name).expanduser()
    if path.exists():
        return Source(name, read_files(path), own=True)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"There is no file or folder {path.absolute()}.")
    if "/" not in name:
        known = [spec.key for spec in SPECS]
        raise UserError(
            f"There is no dataset {name!r}.{nearest(name, known)} Known: {', '.join(known)}, docstrings/<task>; "
            "or an id of the hub (user/name), or a local file or folder."
        )
    return _hub_source(name, None, revision)
