"""Read the authors' published figure data and write them as tidy CSV files, to draw beside our own.

    git clone https://github.com/Yu-AngCheng/NTPS ../ntps-released
    python -m fig_plot.import_published ../ntps-released

Reads Fig1.pkl, Fig2_1.pkl, Fig2_2.pkl and Fig3.pkl, at any depth below the folder given. A pickle can run any code.
The unpickler of this module therefore builds floats and arrays of floats only, by its own substitutes, and refuses
everything else. Writes, if all four are as expected, to fig_plot/published/, which git ignores (the data are theirs):

    fig1.csv  subspace (U, V), category, word, component_1, component_2
    fig2.csv  model, dataset, metric (train_accuracy, train_mse), ntps, value
    fig3.csv  model, dataset, ntps, linear_accuracy, lora_accuracy      (accuracies on the test split)
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from utils.results import write_atomically
from utils.script import ROOT, UserError, run_script

WORDS = {  # the files hold no words; these are the figure's, in its order
    "Joy": ("lovely", "enjoyable", "amazing", "delighted"),
    "Sad": ("horrible", "disappointing", "unhappy", "lonely"),
    "Be": ("am", "is", "are", "was", "were"),
}
NUM_MODELS, NUM_DATASETS = 8, 12
KEYS = ["model", "dataset"]


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    path: tyro.conf.Positional[Path]  # clone of the authors' repository, or a folder that holds the four files
    output_dir: Path = ROOT / "fig_plot" / "published"  # folder of the CSV files


# ------------------------------------------------------------------ an unpickler of floats
class PlainDtype:
    """Replaces numpy.dtype: little-endian floats. numpy's own takes flags from the file, which could be forged."""

    def __init__(self, code: str, align: bool, copy: bool) -> None:
        if code not in ("f4", "f8"):
            raise ValueError(f"it holds a dtype {code!r}")
        self.code = "<" + code

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise ValueError(f"it holds a byte order {state[1]!r}")


class PlainArray:
    """Replaces the array that numpy's _reconstruct makes, which gets its shape and bytes in a second step."""

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
        """The substitute for a name in the file; raises ValueError for any other name."""
        if (module, name) not in SUBSTITUTES:
            raise ValueError(f"it asks for {module}.{name}")
        return SUBSTITUTES[module, name]


# ------------------------------------------------------------------ from pickles to rows
def word_rows(content: Any) -> Iterator[tuple]:
    """Rows of fig1.csv; the file is {subspace: {category: [array (1, 2) per word]}}."""
    for subspace in ("U", "V"):
        for category, words in WORDS.items():
            for word, point in zip(words, content[subspace][category], strict=True):
                yield subspace, category, word, *map(float, point.values.reshape(2))


def cell_rows(content: Any, *fields: str) -> Iterator[tuple]:
    """(model, dataset, value per field); the file is {model: {dataset: {field: number}}}."""
    datasets = next(iter(content.values())).keys()
    if len(content) != NUM_MODELS or len(datasets) != NUM_DATASETS:
        raise ValueError(f"{NUM_MODELS} models and {NUM_DATASETS} datasets expected")
    for model, cells in content.items():
        if cells.keys() != datasets:
            raise ValueError(f"the {NUM_DATASETS} datasets of the others expected for {model}")
        for dataset, cell in cells.items():
            yield model, dataset, *(0.0 + cell[field] for field in fields)


def read_rows(folder: Path, name: str, to_rows: Any, fields: tuple[str, ...], columns: list[str]) -> pd.DataFrame:
    """The rows of one of the authors' files.

    Raises:
        UserError: the file is missing, ambiguous, hostile, damaged or of another shape; nothing of it was run.
    """
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or "none"
        raise UserError(f"{folder} must hold one {name}, but holds {listed}. Give a folder with the four files only.")
    try:
        with open(found[0], "rb") as file:
            table = pd.DataFrame(to_rows(FloatUnpickler(file).load(), *fields), columns=columns)
        if not np.isfinite(table.select_dtypes("number")).all(axis=None):
            raise ValueError("finite numbers expected")
    # errors that damaged bytes raise, after the list in the documentation of pickle
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError,
            ValueError, MemoryError) as error:  # fmt: skip
        raise UserError(
            f"{found[0]} is not the authors' file and was refused ({type(error).__name__}: {error}): this command "
            "reads numpy floats only, and ran and wrote nothing. Use the file as they published it."
        ) from None
    return table


# ------------------------------------------------------------------ run
def published_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Each CSV file by its name; raises UserError as `read_rows` does."""
    components = ["subspace", "category", "word", "component_1", "component_2"]
    of_probes = ("align_score", "metric_data"), [*KEYS, "ntps", "value"]
    accuracy, mse = (read_rows(folder, name, cell_rows, *of_probes) for name in ("Fig2_1.pkl", "Fig2_2.pkl"))
    accuracy.insert(2, "metric", "train_accuracy")
    mse.insert(2, "metric", "train_mse")
    of_gains = ("align_score", "linear_acc", "lora_acc"), [*KEYS, "ntps", "linear_accuracy", "lora_accuracy"]
    return {
        "fig1.csv": read_rows(folder, "Fig1.pkl", word_rows, (), components),
        "fig2.csv": pd.concat([accuracy, mse]),
        "fig3.csv": read_rows(folder, "Fig3.pkl", cell_rows, *of_gains),
    }


def main(config: Config) -> None:
    """Reads and checks all four files before the first row is written."""
    if not config.path.is_dir():
        raise UserError(f"{config.path} is not a folder. Clone https://github.com/Yu-AngCheng/NTPS and give its path.")
    for name, table in published_tables(config.path).items():
        with write_atomically(config.output_dir / name) as temporary:
            table.to_csv(temporary, index=False)  # floats by repr: no digit is lost
        print(f"{name}: {len(table)} rows")
    print(config.output_dir)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
