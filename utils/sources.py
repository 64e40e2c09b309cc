"""Where the rows of a dataset come from: the hub, a local file or folder, the docstring tasks.

Every source ends as a `Source`: one `Table` of columns per split, nothing encoded, dropped or divided yet; that is
`data.py`. Local files are read in `files.py`. Nothing from a hub is ever executed: datasets with a loading script are
refused by the library itself.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from utils.datasets_table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
from utils.files import READERS, VALIDATION_NAMES, Table, read_files
from utils.io import UserError

__all__ = ["VALIDATION_NAMES", "Source", "Table", "copied_source", "find_source"]


@dataclass(frozen=True)
class Source:
    """Everything found under one dataset name."""

    name: str
    splits: dict[str, Table]
    spec: DatasetSpec | None = None
    own: bool = False  # the user can mend the rows: faults are errors; elsewhere such rows are left out with a warning
    copy: Path | None = None  # folder of a local copy of a dataset of the hub


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names closest to a wrong one, as a hint; empty if none is close."""
    tails = {known_name.rsplit("/", 1)[-1].lower(): known_name for known_name in known}
    close = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), tails, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(tails[tail] for tail in close)}?" if close else ""


# ------------------------------------------------------------------ the hub
TERMS = "Accept its terms at https://huggingface.co/datasets/{id}, then log in: hf auth login."
# exceptions, a phrase of their message, what is said, what mends it; the first row that fits is taken
HUB_ERRORS: tuple[tuple[tuple[type[BaseException], ...], str, str, str], ...] = (
    ((GatedRepoError,), "", "is gated", TERMS),
    ((DatasetNotFoundError,), "gated", "is gated", TERMS),
    ((LocalTokenNotFoundError,), "", "needs a login", "Log in: hf auth login."),
    (
        (RevisionNotFoundError, DatasetNotFoundError),
        "revision",
        "has no revision {revision!r}",
        "Give --dataset_revision a branch, a tag or all 40 digits of a commit of https://huggingface.co/datasets/{id}.",
    ),
    (
        (RepositoryNotFoundError, DatasetNotFoundError),
        "",
        "is no local file or folder, and does not exist on the hub or is private",
        "For a private one log in: hf auth login.{nearest} Known: python utils/data.py.",
    ),
    (
        (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError),
        "",
        "is no local file or folder, and the hub cannot be reached",
        "Connect once to download it (and unset HF_HUB_OFFLINE), or use a local file or docstrings/<task>.",
    ),
    (
        (RuntimeError,),
        "scripts are no longer supported",
        "holds a loading script, which is never executed",
        "The hub's conversion may serve: --dataset_revision refs/convert/parquet.",
    ),
    ((ValueError,), "config", "needs another configuration", "Name it: --dataset_name {id}:<config>. {message}"),
    ((DatasetsError, FileNotFoundError, HTTPError, ValueError), "", "cannot be read", "{message}"),
)


def _hub_error(error: Exception, hub_id: str, revision: str | None) -> UserError | None:
    """The error as a user can mend it, or None for one that is not the hub's."""
    message = " ".join(str(error).split())
    for kinds, phrase, fault, remedy in HUB_ERRORS:
        if isinstance(error, kinds) and phrase in message.lower():
            facts = {"id": hub_id, "revision": revision, "message": message, "nearest": nearest(hub_id, list(DATASETS))}
            return UserError(f"Dataset {hub_id} {fault.format(**facts)}. {remedy.format(**facts)}")
    return None


def _load_hub(
    hub_id: str, config: str | None, revision: str | None, data_files: Mapping[str, str] | None = None
) -> datasets.DatasetDict:
    """All splits of a dataset of the hub; no code of it is executed.

    Raises:
        UserError: unknown, gated, offline, no such revision or configuration, no data file that can be read.
    """
    try:
        return datasets.load_dataset(hub_id, config, revision=revision, data_files=data_files)
    except Exception as error:
        if "scripts are no longer supported" in str(error) and revision is None:
            return _load_hub(hub_id, config, PARQUET_BRANCH, data_files)
        if isinstance(error.__cause__, OSError) and error.__cause__.errno:  # a full disk is not the hub's fault
            raise error.__cause__ from None
        user_error = _hub_error(error, hub_id, revision)
        if user_error is None:
            raise
        raise user_error from None


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
    from demo.docstrings import load_task  # it parses the installed packages: only when asked for

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
