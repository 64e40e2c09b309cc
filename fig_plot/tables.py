"""The CSV files of fig_plot/data/ joined into one row per model and dataset: what figures and findings use."""

import csv
import io
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pandas as pd

from utils.algebra.scores import NULL_SCORES
from utils.algebra.scores import SCORES as NAMES  # SCORES here has their labels
from utils.script import UserError
from utils.training.before_after import ADAPTED, pair

DATA_DIR = Path(__file__).resolve().parent / "data"
PUBLISHED_DIR = Path(__file__).resolve().parent / "published"
KEYS = ["model", "dataset"]
RANDOM_MODELS = {
    "tiny-random": "tiny",
    "smollm2-random": "smollm2",
}  # random weights, and whose twin it is
# studies with a folder of their own, and what they are called in figures
STUDIES = {"": "docstring LMs", "smollm2": "SmolLM2-135M"}
ALL_STUDIES = STUDIES | {
    "smollm2-docstrings": "SmolLM2-135M on docstring tasks"
}  # without training: tables, no figures
# name -> what it is; the scores of the run, all at the last layer
SCORES = {
    "ntps": "NTPS",
    "ntps_smallest": "NTPS, smallest eigenvalues",
    "ntps_label": "NTPS, label directions",
    "ntps_whitened": "NTPS, whitened",
    "retained": "retained",
    "ntps_label_z": "z of NTPS, label directions",
    "ntps_whitened_z": "z of NTPS, whitened",
    "retained_z": "z of retained",
}
# of the pooled states of the last layer; only where K_sweep.py had them
FEATURE_SCORES = {"ridge_r2": "ridge R2", "logme": "LogME", "h_oas": "H-score"}
CONTROLS = {
    "ntps_pca": "NTPS, V by PCA",
    "retained_pca": "retained, V by PCA",
    "retained_random": "retained, random V",
    "retained_z_pca": "z of retained, V by PCA",
    "retained_z_random": "z of retained, random V",
    "retained_random_z": "z of retained against random V",
    "retained_lead": "retained - that of random V",
}
# name -> what NTPS should predict; all on test, in shares of 1
MEASURES = {
    "probe_accuracy": "probe accuracy",
    "probe_skill": "probe accuracy above majority",
    "probe_mse": "probe MSE / variance",
    "lora_gain": "LoRA gain",
    "lora_gain_paper": "LoRA gain over the paper's probe",
    "full_gain": "full fine-tuning gain",
    "full_accuracy": "full fine-tuning accuracy",
}
# the sign that the paper claims for the correlation of NTPS with each of them, and with the probes on training rows
CLAIMED = {name: -1 if name.endswith("_mse") or "gain" in name else 1 for name in MEASURES}
CLAIMED |= {"train_accuracy": 1, "train_mse": -1}
# what is in each table of collect.py, whatever it was collected from
COLUMNS = {
    "scores": (*KEYS, "seed", "split", "eigenvectors", "subspace", "center", *NAMES, *(f"{s}_z" for s in NULL_SCORES)),
    "layers": (*KEYS, "seed", "split", "eigenvectors", "layer", "fraction", *NAMES),
    "features": (*KEYS, "seed", "layer"),
    "probes": (*KEYS, "seed", "layer"),
    "training": (*KEYS, "seed", "method"),
    "datasets": ("dataset", "seed"),
    "models": ("model", "num_parameters"),
    "alignment": KEYS,
    "separability": (*KEYS, "space", "group"),
}
# its columns of words; all others are of numbers
WORDS = {*KEYS, "split", "eigenvectors", "subspace", "method", "word", "category", "space", "group"}
TRAINING_KEYS = [*KEYS, "seed", "method", "test_accuracy"]
HELD_OUT = "probe_r2_held_out"  # of the least-squares probe of the last layer
METHOD_COLUMNS = {
    "linear_training": "paper_probe_accuracy",
    "linear_training_converged": "converged_probe_accuracy",
    "lora": "lora_accuracy",
    "full_finetuning": "full_accuracy",
    "from_scratch": "scratch_accuracy",
}


def study_dir(study: str, data_dir: Path = DATA_DIR) -> Path:
    """Where the tables of a study are."""
    return data_dir / study if study else data_dir


def present_studies(data_dir: Path = DATA_DIR, among: dict[str, str] = STUDIES) -> dict[str, str]:
    """The studies that have tables, and what they are called."""
    return {study: title for study, title in among.items() if (study_dir(study, data_dir) / "scores.csv").is_file()}


def figure_name(name: str, study: str) -> str:
    """The name of a figure of a study: `Fig3_ntps`, `Fig3_ntps_smollm2`."""
    return f"{name}_{study}" if study else name


def command_of(name: str) -> str:
    """The command that makes a table."""
    if name == "closed_form":
        return "python -m fig_plot.evidence --results_dir results"
    return f"python -m fig_plot.{'findings' if name.startswith('findings_') else 'collect'}"


def check_lines(text: str) -> None:
    """Raises ValueError where a CSV file has been cut off: pandas would take what is left for a whole one."""
    if text and not text.endswith("\n"):
        raise ValueError("its last line has no end")
    rows = csv.reader(io.StringIO(text, newline=""))
    width = len(next(rows, []))
    for number, row in enumerate(rows, 2):
        if row and len(row) != width:
            raise ValueError(f"row {number} has {len(row)} cells, the first has {width}")


def check_columns(name: str, table: pd.DataFrame) -> None:
    """Raises ValueError where a table of collect.py lacks rows or columns, or has a word in a column of numbers."""
    if lacking := [column for column in COLUMNS[name] if column not in table]:
        raise ValueError(f"it has no column {lacking[0]}")
    if table.empty:
        raise ValueError("it has no rows")
    for column in table:
        if column not in WORDS and not pd.api.types.is_numeric_dtype(table[column]):
            raise ValueError(f"its column {column} is not of numbers")


def read_csv(path: Path) -> pd.DataFrame:
    """A table of collect.py or findings.py: names are text, also a dataset called 2024 or NA, a word `null`.

    Raises:
        UserError: it is damaged, or another table than its name says.
    """
    texts: dict[Hashable, type] = dict.fromkeys(("model", "dataset", "word"), str)
    try:
        text = path.read_text(encoding="utf-8")
        check_lines(text)
        table = pd.read_csv(io.StringIO(text), dtype=texts, keep_default_na=False, na_values=[""])
        if path.stem in COLUMNS:
            check_columns(path.stem, table)
    except (ValueError, csv.Error) as error:  # those of pandas and of the decoder among them
        raise UserError(f"{path} is no whole table ({error}). Make it again: {command_of(path.stem)}") from None
    return table


def read_table(name: str, data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """One of the files of collect.py or findings.py.

    Raises:
        UserError: it is not there, damaged, or another table than its name says.
    """
    path = data_dir / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"No {path}. Run: {command_of(name)}")
    return read_csv(path)


def score_columns(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of the paper's V and of its controls side by side, a row per model, dataset and seed."""
    scores = scores[(scores["split"] == "train") & ~scores["center"]]
    variants = {
        "": scores[(scores["eigenvectors"] == "largest") & (scores["subspace"] == "autoregression")],
        "_smallest": scores[(scores["eigenvectors"] == "smallest") & (scores["subspace"] == "autoregression")],
        "_pca": scores[(scores["eigenvectors"] == "largest") & (scores["subspace"] == "pca")],
        "_random": scores[(scores["eigenvectors"] == "largest") & (scores["subspace"] == "random")],
    }
    keys = [*KEYS, "seed"]
    named = [*NAMES, *(f"{name}_z" for name in NULL_SCORES)]
    columns = variants[""].drop(columns=["split", "eigenvectors", "subspace", "center"])
    probes = [name for name in columns if name.startswith("probe_") and name != HELD_OUT]  # probes.csv has them
    columns = columns.drop(columns=probes)
    for suffix, variant in variants.items():
        if suffix:
            renamed = variant[keys + named].rename(columns={name: name + suffix for name in named})
            columns = columns.merge(renamed, on=keys, how="left")
    return columns


def probe_columns(probes: pd.DataFrame) -> pd.DataFrame:
    """The probe of the last layer, a row per model, dataset and seed."""
    last = probes.loc[probes.groupby([*KEYS, "seed"])["layer"].idxmax()]
    columns = {"test_accuracy": "probe_accuracy", "test_mse_over_variance": "probe_mse"}
    present = {name: new for name, new in columns.items() if name in last}
    return last[[*KEYS, "seed", *present]].rename(columns=present)


def feature_columns(data_dir: Path, probes: pd.DataFrame) -> pd.DataFrame:
    """Scores of the pooled states of the last layer, and the lead of the best; a row per model, dataset and seed.

    The best layer is the one with the highest LogME, which sees training rows only. Its lead is in R2 of the
    least-squares probe on held-out rows.
    """
    keys, path = [*KEYS, "seed"], data_dir / "features.csv"
    if not path.is_file():
        path = data_dir / "closed_form.csv"
        kept = [*keys, *FEATURE_SCORES]
        return read_csv(path)[kept] if path.is_file() else pd.DataFrame(columns=kept)
    table = read_csv(path)
    last, best = (table.loc[table.groupby(keys)[name].idxmax()].set_index(keys) for name in ("layer", "logme"))
    columns = last[[name for name in FEATURE_SCORES if name in last]].assign(
        best_layer=best["layer"], best_layer_lead=best["probe_r2_held_out"] - last["probe_r2_held_out"]
    )
    accuracy = probes.set_index([*keys, "layer"])["test_accuracy"].rename("best_layer_accuracy")
    return columns.reset_index().merge(
        accuracy, left_on=[*keys, "best_layer"], right_index=True, how="left", validate="one_to_one"
    )


def training_columns(training: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of each way of training, a row per model, dataset and seed."""
    wide = training.pivot_table(index=[*KEYS, "seed"], columns="method", values="test_accuracy").reset_index()
    return wide.rename(columns=METHOD_COLUMNS)


def load_seeds(data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """One row per model, dataset and seed: scores, what they should predict, and baselines.

    Differences are between results of the same seed, which share their rows: `lora_gain` and `full_gain` over the
    logistic probe of the last layer, `lora_gain_paper` over the paper's probe. Models after LoRA are left out.

    Raises:
        UserError: a file is not there, damaged, or another table than its name says.
    """
    scores, probes, datasets, models = (
        read_table(name, data_dir) for name in ("scores", "probes", "datasets", "models")
    )
    is_trained = (data_dir / "training.csv").is_file()  # NTPS and probes alone are enough for Figure 2
    training = read_table("training", data_dir) if is_trained else pd.DataFrame(columns=TRAINING_KEYS, dtype=object)
    keys = [*KEYS, "seed"]
    cells = score_columns(scores[~scores["model"].str.endswith(ADAPTED)])
    for columns in (probe_columns(probes), training_columns(training), feature_columns(data_dir, probes)):
        cells = cells.merge(columns, on=keys, how="outer")
    datasets = datasets.drop(columns="num_classes", errors="ignore")
    cells = cells.merge(datasets, on=["dataset", "seed"], how="left").merge(models, on="model", how="left")
    for name in (*METHOD_COLUMNS.values(), *FEATURE_SCORES):
        if name not in cells:
            cells[name] = np.nan
    for name in NAMES:  # the mean of many draws where there is one
        if f"{name}_random_mean" in cells:
            cells[f"{name}_random"] = cells[f"{name}_random_mean"].fillna(cells[f"{name}_random"])
    if "num_classes" in cells:  # a regression has none, and is not to be ranked by them
        cells["num_classes"] = cells["num_classes"].where(cells["num_classes"] > 0)
    cells["retained_lead"] = cells["retained"] - cells["retained_random"]
    cells["probe_skill"] = cells["probe_accuracy"] - cells["majority_accuracy"]
    cells["headroom"] = 1 - cells["probe_accuracy"]
    cells["lora_gain"] = cells["lora_accuracy"] - cells["probe_accuracy"]
    cells["lora_gain_paper"] = cells["lora_accuracy"] - cells["paper_probe_accuracy"]
    cells["full_gain"] = cells["full_accuracy"] - cells["probe_accuracy"]
    return cells


def average_seeds(seeds: pd.DataFrame) -> pd.DataFrame:
    """The rows of `load_seeds` averaged over the seeds that are there: one row per model and dataset."""
    return seeds.groupby(KEYS, as_index=False).mean(numeric_only=True)


def load_cells(data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """As `load_seeds`, one row per model and dataset."""
    return average_seeds(load_seeds(data_dir))


def load_after_lora(data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """Scores after LoRA, with those before it in columns `<score>_before`, a row per model, dataset and seed.

    `retained_lead`, over random V, and the probe on held-out rows are among them where both have it.
    """
    scores = score_columns(read_table("scores", data_dir))
    names: tuple[str, ...] = (*NAMES, HELD_OUT) if HELD_OUT in scores else NAMES
    if "retained_random_mean" in scores:
        scores["retained_lead"] = scores["retained"] - scores["retained_random_mean"]
        names = (*names, "retained_lead")
    return pair(scores, [*KEYS, "seed"], names)


def matrix(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column as models x datasets, NaN where a cell is missing."""
    return cells.pivot(index="model", columns="dataset", values=column)


def mean_of_others(table: pd.DataFrame) -> pd.DataFrame:
    """For each cell of models x datasets the mean over the other models on that dataset."""
    present = table.notna()
    count = present.sum() - present
    return (table.sum() - table.fillna(0)) / count.where(count > 0)


def without_random_weights(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of all models but those with random weights."""
    return rows[~rows["model"].isin(list(RANDOM_MODELS))]


def trained_models(cells: pd.DataFrame) -> pd.DataFrame:
    """The same, smallest model first."""
    return without_random_weights(cells).sort_values(["num_parameters", *KEYS], kind="stable")
