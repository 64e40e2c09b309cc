"""Read the authors' published figure data and write them as tidy CSV files, to draw beside our own.

    git clone https://github.com/Yu-AngCheng/NTPS ../ntps-released
    python -m fig_plot.import_published ../ntps-released

Reads Fig1.pkl, Fig2_1.pkl, Fig2_2.pkl and Fig3.pkl, wherever they lie below the folder given. A pickle can run any
code; these are read by an unpickler that knows floats and arrays of floats, by substitutes written here, and refuses
everything else. Writes, if all four are as expected, to fig_plot/published/, which git ignores (the data are theirs):

    fig1.csv  subspace (U, V), category, word, component_1, component_2
    fig2.csv  model, dataset, metric (train_accuracy, train_mse), ntps, value
    fig3.csv  model, dataset, ntps, linear_accuracy, lora_accuracy      (accuracies on the test split)
"""

import csv
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from utils.results import write_atomically
from utils.script import ROOT, UserError, run_script

WORDS = {  # the files hold no words; these are the figure's, in its order
    "Joy": ("lovely", "enjoyable", "amazing", "delighted"),
    "Sad": ("horrible", "disappointing", "unhappy", "lonely"),
    "Be": ("am", "is", "are", "was", "were"),
}
METRICS = {"Fig2_1.pkl": "train_accuracy", "Fig2_2.pkl": "train_mse"}
NUM_MODELS, NUM_DATASETS = 8, 12
COLUMNS = {
    "fig1.csv": ("subspace", "category", "word", "component_1", "component_2"),
    "fig2.csv": ("model", "dataset", "metric", "ntps", "value"),
    "fig3.csv": ("model", "dataset", "ntps", "linear_accuracy", "lora_accuracy"),
}


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    path: tyro.conf.Positional[Path]  # clone of the authors' repository, or a folder that holds the four files
    output_dir: Path = ROOT / "fig_plot" / "published"  # where the CSV files go


# ------------------------------------------------------------------ an unpickler of floats
class PlainDtype:
    """Replaces numpy.dtype: little-endian floats. numpy's own takes flags from the file, which could be forged."""

    def __init__(self, code: str, align: bool, copy: bool) -> None:
        if code not in ("f4", "f8"):
            raise pickle.UnpicklingError(f"it holds a dtype {code!r}")
        self.code = "<" + code

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError(f"it holds a byte order {state[1]!r}")


class PlainArray:
    """Replaces what numpy's _reconstruct makes: an array, given its shape and bytes in a second step."""

    def __init__(self, subtype: str, shape: tuple, code: bytes) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, raw = state
        self.values = np.frombuffer(raw, dtype.code).reshape(shape, order="F" if fortran_order else "C")


def plain_scalar(dtype: PlainDtype, raw: bytes) -> float:
    """Replaces numpy's scalar."""
    return float(np.frombuffer(raw, dtype.code)[0])


SUBSTITUTES: dict[tuple[str, str], Any] = {("numpy", "dtype"): PlainDtype, ("numpy", "ndarray"): "ndarray"}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # as numpy 1 and numpy 2 write it
    SUBSTITUTES |= {(_module, "_reconstruct"): PlainArray, (_module, "scalar"): plain_scalar}


class FloatUnpickler(pickle.Unpickler):
    """Dicts, lists, text, numbers, and the substitutes above; no name from a file is ever imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SUBSTITUTES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return SUBSTITUTES[module, name]


def read_pickle(path: Path) -> Any:
    """The content of one pickle of floats: arrays as `PlainArray`, scalars as float.

    Raises:
        UserError: the file is damaged, or asks for anything but numpy floats; nothing of it was run.
    """
    with open(path, "rb") as file:
        try:
            return FloatUnpickler(file).load()
        # what damaged bytes raise, after the list in the documentation of pickle
        except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError,
                ValueError, MemoryError) as error:  # fmt: skip
            reason = f"{type(error).__name__}: {error}" if type(error) is not pickle.UnpicklingError else error
            raise UserError(
                f"{path} was refused ({reason}): only numpy floats are read, nothing was run or written. "
                "Use the authors' own file."
            ) from None


# ------------------------------------------------------------------ from pickles to rows
def find_file(folder: Path, name: str) -> Path:
    """The one file of that name at any depth below the folder.

    Raises:
        UserError: there is none, or more than one.
    """
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        what = ", ".join(map(str, found)) if found else "none"
        raise UserError(f"Sought one {name} below {folder}, found {what}. Give a folder that holds just the authors'.")
    return found[0]


def check(condition: bool, path: Path, expected: str) -> None:
    """Raises UserError, saying what was expected of the file, unless the condition holds."""
    if not condition:
        raise UserError(f"{path} is not the authors' file: {expected} expected. Use the file as they published it.")


def word_rows(path: Path) -> Iterator[tuple]:
    """Rows of fig1.csv; the file is {subspace: {category: [array (1, 2) per word]}}."""
    content = read_pickle(path)
    check(isinstance(content, dict) and set(content) == {"U", "V"}, path, "a dict of U and V")
    for subspace, categories in content.items():
        check(isinstance(categories, dict) and set(categories) == set(WORDS), path, "categories Joy, Sad, Be")
        for category, points in categories.items():
            words = WORDS[category]
            check(isinstance(points, list) and len(points) == len(words), path, f"{len(words)} words of {category}")
            for word, point in zip(words, points, strict=True):
                fits = isinstance(point, PlainArray) and point.values.shape == (1, 2)
                check(fits and bool(np.isfinite(point.values).all()), path, "one finite array (1, 2) per word")
                yield subspace, category, word, *map(float, point.values[0])


def cell_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple]:
    """(model, dataset, value per field); the file is {model: {dataset: {field: number}}}."""
    content = read_pickle(path)
    fits = isinstance(content, dict) and len(content) == NUM_MODELS
    check(fits and all(isinstance(cells, dict) for cells in content.values()), path, f"a dict of {NUM_MODELS} models")
    datasets = set().union(*content.values())
    fits = all(set(cells) == datasets for cells in content.values()) and len(datasets) == NUM_DATASETS
    check(fits and all(isinstance(name, str) for name in {*content, *datasets}), path, f"{NUM_DATASETS} datasets each")
    for model, cells in content.items():
        for dataset, cell in cells.items():
            check(isinstance(cell, dict) and set(cell) == set(fields), path, f"the fields {', '.join(fields)}")
            values = [cell[field] for field in fields]
            numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
            check(numbers, path, f"finite numbers for {model}, {dataset}")
            yield model, dataset, *map(float, values)


def published_rows(folder: Path) -> dict[str, list[tuple]]:
    """The rows of each CSV file, in the order of COLUMNS.

    Raises:
        UserError: a file is missing, ambiguous, hostile, or of another shape.
    """
    fig2 = [
        (model, dataset, metric, ntps, value)
        for name, metric in METRICS.items()
        for model, dataset, ntps, value in cell_rows(find_file(folder, name), ("align_score", "metric_data"))
    ]
    fig3_fields = ("align_score", "linear_acc", "lora_acc")
    return {
        "fig1.csv": list(word_rows(find_file(folder, "Fig1.pkl"))),
        "fig2.csv": fig2,
        "fig3.csv": list(cell_rows(find_file(folder, "Fig3.pkl"), fig3_fields)),
    }


# ------------------------------------------------------------------ run
def main(config: Config) -> None:
    """Reads and checks all four files before the first row is written."""
    if not config.path.is_dir():
        raise UserError(f"{config.path} is not a folder. Clone https://github.com/Yu-AngCheng/NTPS and give its path.")
    for name, rows in published_rows(config.path).items():
        with write_atomically(config.output_dir / name) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")  # floats by repr: no digit is lost
            writer.writerows([COLUMNS[name], *rows])
        print(f"{name}: {len(rows)} rows")
    print(config.output_dir)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
