"""Labelled files and folders that the tests of the data room write, and the loader that reads them."""

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from utils.data.load import LabelledTexts, load_texts
from utils.settings import Data, Run

Split = Literal["train", "test", "all"]


def load(name: str | Path, split: Split = "train", copies: Path | None = None, **options: Any) -> LabelledTexts:
    return load_texts(Data(str(name), **options), Run(datasets_dir=copies), split)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_labels(path: Path, labels: list[Any], prefix: str = "text") -> Path:
    """Rows of these labels in the format of the suffix; nothing in them needs quotation marks."""
    rows = [{"text": f"{prefix} {row}", "label": label} for row, label in enumerate(labels)]
    if path.suffix == ".parquet":
        return write_parquet(path, {"text": [row["text"] for row in rows], "label": labels})
    if path.suffix in (".csv", ".tsv"):
        tab = "," if path.suffix == ".csv" else "\t"
        return write(path, f"text{tab}label\n" + "".join(f"{row['text']}{tab}{row['label']}\n" for row in rows))
    return write(path, json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
