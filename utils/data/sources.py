"""The place that a dataset's rows come from: the hub, a local file or folder, a local copy, the docstring tasks."""

from dataclasses import dataclass
from pathlib import Path

from utils.data.files import READERS, Table, arrow_table, read_files
from utils.data.table import DATASETS, PARQUET_BRANCH, SPECS, DatasetSpec
from utils.hub import Repository, hub_errors, nearest
from utils.script import UserError


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
    path, (folder, _, subset) = Path(name).expanduser(), name.rpartition(":")
    if path.exists():
        return Source(name, read_files(path), own=True)
    if folder and Path(folder).expanduser().is_dir():
        return Source(name, read_files(Path(folder).expanduser(), subset), own=True)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"There is no file or folder {path.absolute()}.")
    if "/" not in name:
        known = [spec.key for spec in SPECS]
        raise UserError(
            f"There is no dataset {name!r}.{nearest(name, known)} Known: {', '.join(known)}, docstrings/<task>; "
            "or an id of the hub (user/name), or a local file or folder."
        )
    return _hub_source(name, None, revision)


def _hub_source(name: str, spec: DatasetSpec | None, revision: str | None) -> Source:
    """A dataset of the hub; `name` may be `id:config` where it is not in the table.

    Raises:
        UserError: unknown, gated, offline, no such revision or configuration, no data file that can be read.
    """
    import datasets

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
    """A dataset from its local copy, read as if it came from the hub: template, label, split rule, class names.

    Args:
        name: key or hub id of the table, or the id of any other dataset.
        folder: holds `<key with / as __>/{train,test,validation}.parquet` in the hub's own columns.

    Raises:
        UserError: no such folder, no copy in it, a file that cannot be read or holds no row.
    """
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
