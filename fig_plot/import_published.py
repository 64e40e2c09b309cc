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


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    path: tyro.conf.Positional[Path]  # clone of the authors' repository, or a folder that holds the four files
    output_dir: Path = ROOT / "fig_plot" / "published"  # folder of the CSV files


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
    """Replaces the array that numpy's _reconstruct makes, which gets its bytes in a second step; flat."""

    def __init__(self, *ignored: Any) -> None:
        self.values: list[float] = []

    def __setstate__(self, state: tuple) -> None:
        self.values = np.frombuffer(state[4], state[2].code).tolist()


SUBSTITUTES: dict[tuple[str, str], Any] = {("numpy", "dtype"): PlainDtype, ("numpy", "ndarray"): "ndarray"}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and of numpy 2
    SUBSTITUTES[_module, "_reconstruct"] = PlainArray
    SUBSTITUTES[_module, "scalar"] = lambda dtype, raw: float(np.frombuffer(raw, dtype.code)[0])


class FloatUnpickler(pickle.Unpickler):
    """Reads dicts, lists, text, numbers, and the substitutes above; imports no name from a file."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SUBSTITUTES:
            raise ValueError(f"it asks for {module}.{name}")
        return SUBSTITUTES[module, name]


def word_rows(content: Any) -> Iterator[tuple]:
    """Rows of fig1.csv; the file is {subspace: {category: [array (1, 2) per word]}}."""
    for subspace in ("U", "V"):
        for category, words in WORDS.items():
            for word, point in zip(words, content[subspace][category], strict=True):
                yield subspace, category, word, *point.values


def cell_rows(content: Any, *fields: str) -> Iterator[tuple]:
    """Rows (model, dataset, value per field); the file is {model: {dataset: {field: number}}}."""
    for model, cells in content.items():
        for dataset, cell in cells.items():
            yield model, dataset, *(0.0 + cell[field] for field in fields)


def read_rows(folder: Path, name: str, to_rows: Any, fields: tuple[str, ...], columns: list[str]) -> pd.DataFrame:
    """The rows of one of the authors' files; raises UserError if it is missing, ambiguous, hostile or damaged."""
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise UserError(f"{folder} must hold one {name}, but holds {', '.join(map(str, found)) or 'none'}. Give the "
                        "path of a clone of https://github.com/Yu-AngCheng/NTPS.")  # fmt: skip
    try:
        with open(found[0], "rb") as file:
            table = pd.DataFrame(to_rows(FloatUnpickler(file).load(), *fields), columns=columns)
        if not np.isfinite(table.select_dtypes("number")).all(axis=None):
            raise ValueError("finite numbers expected")
    except Exception as error:  # damaged bytes raise errors of many types
        raise UserError(f"{found[0]} is not figure data ({type(error).__name__}: {error}); no code of it ran. Use the "
                        "authors' file as they published it.") from None  # fmt: skip
    return table


def main(config: Config) -> None:
    """Reads and checks all four files, then writes the CSV files."""
    keys, scores = ["model", "dataset", "ntps"], ("align_score", "metric_data")
    accuracy, mse = (
        read_rows(config.path, name, cell_rows, scores, [*keys, "value"]) for name in ("Fig2_1.pkl", "Fig2_2.pkl")
    )
    accuracy.insert(2, "metric", "train_accuracy")
    mse.insert(2, "metric", "train_mse")
    components = ["subspace", "category", "word", "component_1", "component_2"]
    tables = {
        "fig1.csv": read_rows(config.path, "Fig1.pkl", word_rows, (), components),
        "fig2.csv": pd.concat([accuracy, mse]),
        "fig3.csv": read_rows(config.path, "Fig3.pkl", cell_rows, ("align_score", "linear_acc", "lora_acc"),
                              [*keys, "linear_accuracy", "lora_accuracy"]),
    }  # fmt: skip
    for name, table in tables.items():
        with write_atomically(config.output_dir / name) as temporary:
            table.to_csv(temporary, index=False)  # floats by repr: no digit is lost
        print(f"{name}: {len(table)} rows")
    print(config.output_dir)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
