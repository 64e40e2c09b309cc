"""Read the CSV files of a study, and join them into one row per model and dataset, for figures and findings.

A study is a folder with a scores.csv; `title` in study.json beside it is its name in figures.
"""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd

from utils.algebra.scores import NULL_SCORES, SCORES
from utils.results import read_stored, write_atomically
from utils.script import UserError

ADAPTED = "+lora"  # end of the name of a model with a merged adapter
DATA_DIR = Path(__file__).resolve().parent / "data"
CELL_KEYS = ["model", "dataset"]
SEED_KEYS = [*CELL_KEYS, "seed"]
RANDOM = "-random"  # end of the name of a twin with random weights
FEATURE_SCORES = ("ridge_r2", "logme", "h_oas")  # use the pooled states of the last layer
# the outcomes that NTPS should predict; all on test, in shares of 1
MEASURES = ("probe_accuracy", "probe_skill", "probe_mse", "lora_gain", "lora_gain_paper", "full_gain", "full_accuracy")
# name -> label in tables and figures, in the order of the tables
LABELS = {
    "probe_accuracy": "probe accuracy",
    "probe_skill": "probe accuracy above majority",
    "probe_mse": "probe MSE / variance",
    "lora_gain": "LoRA gain",
    "full_gain": "full fine-tuning gain",
    "full_accuracy": "full fine-tuning accuracy",
    "lora_accuracy": "LoRA accuracy",
    "ntps": "`ntps`, the paper's score",
    "ntps_smallest": "... smallest eigenvalues, as released",
    "ntps_label": "`ntps_label`",
    "ntps_whitened": "`ntps_whitened`",
    "retained": "`retained`",
    "retained_z": "z of `retained`",
    "retained_random": "`retained` of a random V",
    "retained_z_random": "z of `retained` of a random V",
    "retained_lead": "`retained` - that of a random V",
    "retained_random_z": "z of `retained` against random V",
    "retained_pca": "`retained` of V by PCA",
    "ridge_r2": "ridge R2",
    "logme": "LogME",
    "h_oas": "H-score",
    "num_classes": "number of classes",
    "num_parameters": "number of parameters",
    "bag_of_words_accuracy": "bag of words",
    "majority_accuracy": "majority class",
    "headroom": "1 - probe accuracy",
    "best_layer_accuracy": "probe of the best layer",
    "mean of the others": "mean of the other models",
    "best_layer_lead": "R2 of the best layer - that of the last",
    "probe_r2_held_out": "R2 of a linear probe on held-out rows",
}
# the sign that the paper claims for the correlation of NTPS with each measure, on test and on training rows
CLAIMED = {name: -1 if name.endswith("_mse") or "gain" in name else 1 for name in MEASURES}
CLAIMED |= {"train_accuracy": 1, "train_mse": -1}
# the tables of collect.py, with columns that each has; all columns outside TEXTS hold numbers
COLLECTED = {
    **dict.fromkeys(("scores", "layers", "features", "probes", "training"), SEED_KEYS),
    **{"datasets": ["dataset"], "alignment": CELL_KEYS, "separability": CELL_KEYS, "models": ["model"]},
}
# the script whose results fill a table; K_sweep.py fills the others
SCRIPTS = {"probes": "linear_sklearn.py", "datasets": "linear_sklearn.py", "training": "linear_training.py",
           "alignment": "alignment_vis.py", "separability": "alignment_vis.py"}  # fmt: skip
HELD_OUT = "probe_r2_held_out"  # least-squares probe of the last layer
# columns that a study may lack: of regressions alone, or of moments without folds or test rows
OPTIONAL = {"probes": ["test_accuracy"], "datasets": ["majority_accuracy", "bag_of_words_accuracy"],
            "features": [*FEATURE_SCORES, HELD_OUT], "training": ["test_accuracy"]}  # fmt: skip
TEXTS = {*CELL_KEYS, "split", "eigenvectors", "subspace", "coordinates", "method", "word", "category", "space", "group"}
# controls of V, by the suffix that they add to the name of a score
VARIANTS = {"_smallest": ("smallest", "autoregression"), "_pca": ("largest", "pca"), "_random": ("largest", "random")}
METHOD_COLUMNS = {
    "linear_training": "paper_probe_accuracy",
    "linear_training_converged": "converged_probe_accuracy",
    "lora": "lora_accuracy",
    "full_finetuning": "full_accuracy",
    "from_scratch": "scratch_accuracy",
}


# ------------------------------------------------------------------ studies and files
def find_studies(tables_dir: Path = DATA_DIR) -> dict[Path, str]:
    """Titles of all studies at or below a folder, by folder, itself first; raises UserError if it holds none."""
    titles = {}
    for folder in sorted(path.parent for path in tables_dir.rglob("scores.csv")):
        study = folder / "study.json"
        titles[folder] = read_stored(study)["title"] if study.is_file() else folder.resolve().name
    if not titles:
        raise UserError(f"No scores.csv at or below {tables_dir}. Run: python K_sweep.py, python -m fig_plot.collect")
    return titles


def figure_name(name: str, study: Path, tables_dir: Path = DATA_DIR) -> str:
    """The name of a figure of a study: `Fig3_ntps`, or `Fig3_ntps_smollm2` of the study in the folder smollm2."""
    return "_".join([name, *study.relative_to(tables_dir).parts])


def table_path(name: str, data_dir: Path) -> Path:
    """The path of a table; only `layers` is a .csv.gz file."""
    return data_dir / (f"{name}.csv.gz" if name == "layers" else f"{name}.csv")


def read_table(name: str, data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """Reads a table of collect.py or of the findings; names stay text, even a dataset called 2024 or NA.

    Raises UserError if the file is missing, damaged, or another table than its name says.
    """
    path, module = table_path(name, data_dir), "findings" if name.startswith("findings_") else "collect"
    if not path.is_file():
        script = f"python {SCRIPTS[name]}, then " if name in SCRIPTS else ""
        raise UserError(f"No {path}. Run: {script}python -m fig_plot.{module}")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        widths = {len(row) for row in csv.reader(io.StringIO(text, newline=""))}
        if len(widths) != 1 or not text.endswith("\n"):  # pandas would accept the rest as a whole file
            raise ValueError("it has been cut off, or its rows differ in length")
        names = {"model": str, "dataset": str, "word": str}
        table = pd.read_csv(io.StringIO(text), dtype=names, keep_default_na=False, na_values=[""])
        words = [column for column in table.select_dtypes(exclude=("number", "bool")) if column not in TEXTS]
        keys = COLLECTED.get(name, [])
        if keys and (table.empty or words or not {*keys} <= {*table}):
            raise ValueError(f"it has no rows, lacks one of the columns {', '.join(keys)}, or has words in "
                             f"{', '.join(words) or 'a column of numbers'}")  # fmt: skip
    except (ValueError, csv.Error, OSError, EOFError) as error:  # includes errors of pandas, gzip and the decoder
        raise UserError(f"{path} is no complete table ({error}). Make it again: python -m fig_plot.{module}") from None
    for column in OPTIONAL.get(name, []):
        table[column] = table.get(column, np.nan)
    return table


def save_csv(path: Path, table: pd.DataFrame) -> None:
    """Writes a table atomically: floats with six significant digits, whole numbers with all digits."""
    # pandas reads a column of counts with an empty cell as floats
    floats = table.infer_objects().select_dtypes("float")
    counts = [name for name in floats if floats[name].notna().any() and (floats[name].dropna() % 1 == 0).all()]
    whole = table.astype(dict.fromkeys(counts, "Int64"))
    text = whole.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    with write_atomically(path) as temporary:
        # without a time in the file the same table gives the same bytes
        temporary.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


# ------------------------------------------------------------------ columns of a cell
def score_columns(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of the paper's V and of its controls side by side, a row per model, dataset and seed."""
    scores = scores[(scores["split"] == "train") & ~scores["center"] & (scores["coordinates"] == "as_is")]
    of_v = {kind: rows for kind, rows in scores.groupby(["eigenvectors", "subspace"])}
    # probes.csv has the probe's error on test rows under the same name
    columns = of_v.get(("largest", "autoregression"), scores[:0]).drop(columns="probe_mse", errors="ignore")
    columns = columns.drop(columns=["split", "eigenvectors", "coordinates", "subspace", "center"])
    named = [*SCORES, *(f"{name}_z" for name in NULL_SCORES)]
    for suffix, kind in VARIANTS.items():
        renamed = of_v.get(kind, scores[:0]).set_index(SEED_KEYS)[named].add_suffix(suffix)
        columns = columns.merge(renamed.reset_index(), on=SEED_KEYS, how="left")
    for name in SCORES:  # the mean over many random V, if K_sweep.py drew them
        if f"{name}_random_mean" in columns:
            columns[f"{name}_random"] = columns[f"{name}_random_mean"].fillna(columns[f"{name}_random"])
    return columns.assign(retained_lead=columns["retained"] - columns["retained_random"])


def probe_columns(probes: pd.DataFrame) -> pd.DataFrame:
    """The probe of the last layer, a row per model, dataset and seed."""
    last = probes.loc[probes.groupby(SEED_KEYS)["layer"].idxmax()]
    named = last.rename(columns={"test_accuracy": "probe_accuracy", "test_mse_over_variance": "probe_mse"})
    return named[[name for name in (*SEED_KEYS, "probe_accuracy", "probe_mse") if name in named]]


def feature_columns(data_dir: Path, probes: pd.DataFrame) -> pd.DataFrame:
    """Scores of the pooled states of the last layer, and the lead of the best; a row per model, dataset and seed.

    The best layer is the one with the highest LogME, a score of training rows. Its lead is in R2 of the
    least-squares probe on held-out rows. A study of the last layer alone has no best one.
    """
    if not table_path("features", data_dir).is_file():
        return pd.DataFrame(columns=[*SEED_KEYS, *FEATURE_SCORES])
    table = read_table("features", data_dir).merge(probes[[*SEED_KEYS, "layer", "test_accuracy"]], how="left")
    of_cells = table.groupby(SEED_KEYS)
    last, best = (table.loc[of_cells[name].idxmax()].set_index(SEED_KEYS) for name in ("layer", "logme"))
    columns = last.reindex(columns=FEATURE_SCORES)
    if of_cells.size().max() > 1:
        columns["best_layer"], columns["best_layer_accuracy"] = best["layer"], best["test_accuracy"]
        columns["best_layer_lead"] = best[HELD_OUT] - last[HELD_OUT]
    return columns.reset_index()


def training_columns(data_dir: Path) -> pd.DataFrame:
    """Test accuracy of each training method, a row per model, dataset and seed; empty for a study without training."""
    if not table_path("training", data_dir).is_file():
        return pd.DataFrame(columns=SEED_KEYS, dtype=object)
    training = read_table("training", data_dir)
    wide = training.pivot_table(index=SEED_KEYS, columns="method", values="test_accuracy").reset_index()
    return wide.rename(columns=METHOD_COLUMNS)


def load_seeds(data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """One row per model, dataset and seed: scores, the outcomes that they should predict, and baselines.

    Differences are between results of the same seed, which share their rows: `lora_gain` and `full_gain` over the
    logistic probe of the last layer, `lora_gain_paper` over the paper's probe. Models after LoRA have no row.
    """
    scores, probes, datasets, models = (
        read_table(name, data_dir) for name in ("scores", "probes", "datasets", "models")
    )
    cells = score_columns(scores[~scores["model"].str.endswith(ADAPTED)])
    for columns in (probe_columns(probes), training_columns(data_dir), feature_columns(data_dir, probes)):
        cells = cells.merge(columns, on=SEED_KEYS, how="outer")
    datasets = datasets.drop(columns="num_classes", errors="ignore")
    cells = cells.merge(datasets, on=["dataset", "seed"], how="left").merge(models, on="model", how="left")
    for name in {*METHOD_COLUMNS.values(), *FEATURE_SCORES} - {*cells}:
        cells[name] = np.nan
    probe = cells["probe_accuracy"]
    return cells.assign(
        num_classes=cells["num_classes"].where(cells["num_classes"] > 0),  # a regression has no number of classes
        probe_skill=probe - cells["majority_accuracy"],
        headroom=1 - probe,
        lora_gain=cells["lora_accuracy"] - probe,
        lora_gain_paper=cells["lora_accuracy"] - cells["paper_probe_accuracy"],
        full_gain=cells["full_accuracy"] - probe,
    )


def average_seeds(seeds: pd.DataFrame) -> pd.DataFrame:
    """The rows of `load_seeds` averaged over seeds: one per model and dataset."""
    return seeds.groupby(CELL_KEYS, as_index=False).mean(numeric_only=True)


def load_cells(data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """As `load_seeds`, averaged over seeds."""
    return average_seeds(load_seeds(data_dir))


def load_after_lora(data_dir: Path = DATA_DIR) -> pd.DataFrame:
    """Scores after LoRA, with those before it in columns `<score>_before`, a row per model, dataset and seed.

    They include `retained_lead`, over random V, and the probe on held-out rows, if any is known after LoRA.
    """
    scores = score_columns(read_table("scores", data_dir))
    adapted = scores["model"].str.endswith(ADAPTED)
    known = [name for name in (HELD_OUT, "retained_lead") if name in scores and scores.loc[adapted, name].notna().any()]
    scores = scores[[*SEED_KEYS, *SCORES, *known]]
    after = scores[adapted].assign(model=scores["model"].str.removesuffix(ADAPTED))
    return after.merge(scores[~adapted], on=SEED_KEYS, suffixes=("", "_before"))


def without_random_weights(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of models that have no random weights."""
    return rows[~rows["model"].str.endswith(RANDOM)]


def trained_models(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of models with trained weights, smallest model first."""
    return without_random_weights(cells).sort_values(["num_parameters", *CELL_KEYS], kind="stable")
