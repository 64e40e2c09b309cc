"""Turn results/** into the tidy CSV files that every figure is drawn from.

    python -m fig_plot.collect                                         # all that is under results/
    python -m fig_plot.collect --results_dir results/study/docstrings   # the docstring study, as committed
    python -m fig_plot.collect --results_dir results/study/smollm2 --output_dir fig_plot/data/smollm2

Reads what K_sweep.py, linear_sklearn.py and the three training scripts wrote, at any depth. What is unfinished, damaged
or foreign is named, skipped and counted, and so is a model and dataset that one of the scripts has not seen.
Writes to fig_plot/data/, a row each:

    scores.csv     model, dataset, seed, order and subspace of V: the score of the run, its null, its probe
    layers.csv     the same, layer and fraction: the scores there (V by autoregression, before LoRA)
    features.csv   model, dataset, seed, layer: scores of the pooled states that need neither U nor V
    probes.csv     model, dataset, seed, layer: scikit-learn's probes on both splits
    training.csv   model, dataset, seed, method: scores on test at the last step
    datasets.csv   dataset: rows, classes, majority share, bag of words
    models.csv     model: parameters, and for the docstring LMs their held-out loss
    alignment.csv, separability.csv   the words of alignment_vis.py, and how far their categories are apart
    sources.json   the command, library versions, commits
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fig_plot.tables import DATA_DIR, WORDS, read_csv
from utils.algebra.scores import SCORES, option_suffix
from utils.models.table import MODELS
from utils.results import ForeignError, load_json, save_json, write_atomically
from utils.script import ROOT, UserError, run_script

TABLES = ("scores", "layers", "features", "probes", "training", "datasets", "models", "alignment", "separability")
KEYS = (  # what tells rows of a table apart, and sorts them
    *("model", "dataset", "seed", "method", "split", "eigenvectors", "subspace", "center", "num_components"),
    *("layer", "fraction", "space", "group", "word"),
)
METHODS = ("linear_training", "lora", "full_finetuning", "from_scratch")
DIGITS = "%.6g"


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    results_dir: Path = Path("results")  # searched at any depth
    output_dir: Path = DATA_DIR  # the CSV files go there, replacing those of the same name
    keep: bool = False  # keep the rows of those files that no result found now replaces: a study in several pieces
    strict: bool = False  # exit with 1 if anything was skipped or is missing


# ------------------------------------------------------------------ one result -> rows
def shown_name(name: str) -> str:
    """The name a reader knows from the name on disk: `Qwen__Qwen2-0.5B` -> `Qwen/Qwen2-0.5B`."""
    return name.replace("__", "/")


def dataset_of(path: Path, config: dict) -> str:
    """The dataset of a file of K_sweep.py, without the options in its name."""
    return shown_name(path.stem.removesuffix(option_suffix(config)))


def score_row(path: Path, result: dict) -> dict[str, Any]:
    """A row of scores.csv."""
    config, last = result["config"], result["layers"][-1]
    row = {"model": shown_name(path.parent.name), "dataset": dataset_of(path, config), "seed": config["seed"]}
    row |= {name: config[name] for name in ("split", "eigenvectors", "subspace", "center")}
    row |= {name: result[name] for name in ("num_samples", "num_classes", "hidden_size")}
    row |= {name: last[name] for name in ("layer", "rank_u", "rank_v", "rank_label")}
    for name in SCORES:
        score = result["score"][name]
        row |= {name if key == "value" else f"{name}_{key}": value for key, value in score.items()}
    return row | {name: value for name, value in last.items() if name.startswith("probe_")}


def layer_rows(path: Path, result: dict) -> Iterator[dict[str, Any]]:
    """Rows of layers.csv."""
    config = result["config"]
    keys = {"model": shown_name(path.parent.name), "dataset": dataset_of(path, config), "seed": config["seed"]}
    keys |= {name: config[name] for name in ("split", "eigenvectors", "center")}
    is_kept = config["subspace"] == "autoregression" and not keys["model"].endswith("+lora")
    for layer in result["layers"] if is_kept else ():
        for index, fraction in enumerate(result["fractions"]):
            scores = {name: layer[name] and layer[name][index] for name in (*SCORES, "chance")}
            yield {**keys, "layer": layer["layer"], "fraction": fraction, **scores}


def feature_rows(path: Path, result: dict) -> Iterator[dict[str, Any]]:
    """Rows of features.csv: what means something of the closed-form scores, before LoRA, training rows."""
    config, model = result["config"], shown_name(path.parent.name)
    keys = {"model": model, "dataset": dataset_of(path, config), "seed": config["seed"]}
    for layer in result["layers"] if config["split"] == "train" and not model.endswith("+lora") else ():
        if found := layer.get("closed_form"):
            values = {name: score["value"] for name, score in found.items() if not score["meaningless"]}
            yield {**keys, "layer": layer["layer"], **values}


def probe_rows(path: Path, result: dict) -> Iterator[dict[str, Any]]:
    """Rows of probes.csv."""
    keys = {"model": shown_name(path.parent.name), "dataset": shown_name(path.stem), "seed": result["config"]["seed"]}
    for layer in result["layers"]:
        scores = {f"{split}_{name}": value for split in ("train", "test") for name, value in layer[split].items()}
        yield {**keys, "layer": layer["layer"], **scores}


def training_row(path: Path, result: dict) -> dict[str, Any]:
    """A row of training.csv."""
    config, folder = result["config"], path.parent
    row = {"model": shown_name(folder.parent.name), "dataset": shown_name(folder.name), "seed": config["seed"]}
    row |= {"method": folder.parent.parent.name, "learning_rate": config["learning_rate"]}
    if config.get("standardize"):  # the probe that has converged, beside the paper's
        row |= {"dataset": row["dataset"].removesuffix(".standardized"), "method": "linear_training_converged"}
    row |= {name: result[name] for name in ("num_train", "num_steps", "texts_per_step", "num_trained_parameters")}
    row |= {name: value for name, value in result["last"].items() if name.startswith("test_")}
    return row | {"train_loss": result["last"]["train_loss"], "seconds": round(result["seconds"], 1)}


def alignment_rows(path: Path, result: dict, table: str) -> Iterator[dict[str, Any]]:
    """Rows of alignment.csv, or those of separability.csv."""
    config = result["config"]
    keys = {"model": shown_name(path.parent.name), "dataset": shown_name(path.name.split(".layer")[0])}
    keys |= {name: config[name] for name in ("split", "center", "num_components", "layer")}
    if table == "alignment":
        yield from ({**keys, **word} for word in result["words"])
        return
    for space, described in result["subspaces"].items():
        for group, measures in described["separability"].items():
            numbers = {f"{name}_{key}": value for name, found in measures.items() for key, value in found.items()}
            yield {**keys, "space": space, "group": group, **numbers}


def dataset_row(path: Path, result: dict) -> dict[str, Any]:
    """A row of datasets.csv, from a result of linear_sklearn.py."""
    row = {"dataset": shown_name(path.stem), "seed": result["config"]["seed"], "num_classes": result["num_classes"]}
    row |= {f"num_{split}": number for split, number in result["num_samples"].items()}
    for name, scores in result["baselines"].items():
        kept = [score for score in ("accuracy", "balanced_accuracy", "r2") if score in scores]
        row |= {f"{name}_{score}": scores[score] for score in kept}
    return row


def model_row(name: str, model_name: str) -> dict[str, Any]:
    """A row of models.csv: from pretraining.json where the model has one, else the table of known models.

    Args:
        name: as shown.
        model_name: as given to the scripts.
    """
    spec = MODELS.get(model_name)
    report_path = ROOT / (spec.path if spec else model_name) / "pretraining.json"
    if report_path.is_file():
        report = load_json(report_path)
        fields = ("num_parameters", "held_out_loss", "unigram_loss", "tokens_seen", "seconds")
        return {"model": name, **{field: report[field] for field in fields}}
    return {"model": name, "num_parameters": parse_size(spec.parameters) if spec else None}


def parse_size(size: str) -> float:
    """`0.5B` -> 5e8."""
    return float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]


# ------------------------------------------------------------------ all results -> tables
READERS: dict[str, Callable[[Path, dict], Any]] = {
    "ntps": lambda path, result: {
        "scores": [score_row(path, result)],
        "layers": list(layer_rows(path, result)),
        "features": list(feature_rows(path, result)),
    },
    "linear_sklearn": lambda path, result: {
        "probes": list(probe_rows(path, result)),
        "datasets": [dataset_row(path, result)],
    },
    "alignment": lambda path, result: {
        table: list(alignment_rows(path, result, table)) for table in ("alignment", "separability")
    },
    **{method: lambda path, result: {"training": [training_row(path, result)]} for method in METHODS},
}


def result_files(results_dir: Path) -> Iterator[tuple[str, Path]]:
    """Kind and path of everything that should be a result: a JSON file, or the folder of a training run."""
    for kind in READERS:
        for folder in sorted(path for path in results_dir.rglob(kind) if path.is_dir()):
            pattern = "*/*" if kind in METHODS else "*/*.json"
            for path in sorted(folder.glob(pattern)):
                yield kind, path / "metrics.json" if kind in METHODS else path


def check_cells(rows: Iterable[dict[str, Any]]) -> None:
    """Raises TypeError where a cell is not what its column holds: a list or an object, or a word among numbers."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, list | dict) or (isinstance(value, str) and name not in WORDS):
                raise TypeError(f"{name} is {str(value)[:40]!r}")


def read_all(results_dir: Path) -> tuple[dict[str, list[dict]], list[dict], list[str]]:
    """The rows of each table, the results themselves, and what was skipped, in words."""
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    results, skipped, model_names = [], [], dict[str, str]()
    for kind, path in result_files(results_dir):
        if not path.is_file():
            skipped.append(f"partial: {path.parent} has no {path.name}")
            continue
        try:
            result = load_json(path)
            rows = READERS[kind](path, result)
            model_name, commit = result["config"]["model_name"], result["environment"]["git_commit"]
            check_cells([{"model": model_name, "word": commit or ""}, *itertools.chain.from_iterable(rows.values())])
        except ForeignError as error:
            skipped.append(f"foreign: {error}")
        except UserError as error:
            skipped.append(f"damaged: {error}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            skipped.append(f"foreign: {path} is not a result of {kind} ({type(error).__name__}: {error})")
        else:
            results.append(result)
            for table, added in rows.items():
                tables[table].extend(added)
                model_names |= {row["model"]: model_name for row in added if "model" in row}
    tables["models"] = [model_row(*names) for names in sorted(model_names.items()) if not names[0].endswith("+lora")]
    return tables, results, skipped


def missing_cells(tables: dict[str, list[dict]]) -> list[str]:
    """Models and datasets that K_sweep.py or linear_sklearn.py has not seen but another script has, in words."""
    seen = {name: {(row["model"], row["dataset"]) for row in tables[name]} for name in ("scores", "probes", "training")}
    after_lora = {cell for cell in seen["scores"] if cell[0].endswith("+lora")}
    everything = (seen["scores"] | seen["probes"] | seen["training"]) - after_lora
    scripts = {"scores": "K_sweep.py", "probes": "linear_sklearn.py"}
    return [
        f"missing: {model} on {dataset} has no result of {script}"
        for table, script in scripts.items()
        for model, dataset in sorted(everything - seen[table])
    ]


def sources(results: list[dict], command: str) -> dict[str, Any]:
    """Where the numbers come from: command, library versions and commits, each once."""

    def distinct(values: list[Any]) -> list[Any]:
        return [value for index, value in enumerate(values) if value not in values[:index]]

    environments = [result["environment"] for result in results]
    commits = sorted({environment["git_commit"] or "unknown" for environment in environments})
    bare = [{name: value for name, value in found.items() if name != "git_commit"} for found in environments]
    return {"command": command, "num_results": len(results), "git_commits": commits, "environments": distinct(bare)}


def to_table(name: str, rows: list[dict]) -> pd.DataFrame:
    """The rows in the order of their keys, each once.

    Baselines of a dataset are in the result of every model; where machines round one differently the first stands.

    Raises:
        UserError: two rows of the same keys differ.
    """
    table = pd.DataFrame(rows).drop_duplicates()
    keys = [key for key in KEYS if key in table]
    if name == "datasets":
        table = table.drop_duplicates([column for column in table if column in keys or column.startswith("num_")])
    twice = table[table.duplicated(keys)]
    if len(twice):
        which = ", ".join(f"{key} {value}" for key, value in twice.iloc[0][keys].items())
        raise UserError(f"{name}: two different results of {which}. Name one of their folders with --results_dir.")
    return in_order(table)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of their keys; words keep theirs."""
    order = [key for key in KEYS if key in table and key != "word"]
    return table.sort_values(order, kind="stable") if order else table


def with_rows_of(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table, and those of the file before it whose keys it does not have, in the order of their keys.

    Raises:
        UserError: that file is damaged, or another table than its name says.
    """
    if not path.is_file():
        return table
    both = pd.concat([table, read_csv(path)], ignore_index=True)
    keys = [key for key in KEYS if key in both]
    as_written = both[keys].map(lambda value: DIGITS % value if isinstance(value, float) else value)
    return in_order(both[~as_written.duplicated()])


def save_csv(path: Path, table: pd.DataFrame) -> None:
    """Writes a table atomically, with six significant digits; whole numbers with all of theirs."""
    # a column of counts that is empty somewhere is one of floats in pandas, until it is told otherwise
    floats = table.select_dtypes("float")
    counts = [name for name in floats if floats[name].notna().any() and (floats[name].dropna() % 1 == 0).all()]
    whole = table.astype(dict.fromkeys(counts, "Int64"))
    with write_atomically(path) as temporary:
        whole.to_csv(temporary, index=False, float_format=DIGITS, lineterminator="\n")


def main(config: Config) -> None:
    """Writes the tables, and says what was skipped.

    Raises:
        UserError: no result at all, a damaged table with --keep, or with --strict anything skipped or missing.
    """
    tables, results, skipped = read_all(config.results_dir)
    if not results:
        found = f"; {len(skipped)} skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"No results under {config.results_dir}{found}. Make some: python cache.py, python K_sweep.py")
    skipped += missing_cells(tables)
    merged = {name: to_table(name, rows) for name, rows in tables.items()}
    if config.keep:  # all are read before one is written: a damaged one leaves the others as they are
        merged = {name: with_rows_of(config.output_dir / f"{name}.csv", table) for name, table in merged.items()}
    for name, table in merged.items():
        if table.empty:
            (config.output_dir / f"{name}.csv").unlink(missing_ok=True)  # a table of other results must not stay
            continue
        save_csv(config.output_dir / f"{name}.csv", table)
        print(f"{len(table):7,} rows  {config.output_dir / name}.csv")
    command = f"python -m fig_plot.collect --results_dir {config.results_dir}{' --keep' if config.keep else ''}"
    origin, path = sources(results, command), config.output_dir / "sources.json"
    if config.keep and path.is_file():
        before = load_json(path)
        del origin["num_results"]  # how many of those before are among them is not known
        for key in ("git_commits", "environments"):
            origin[key] = before[key] + [value for value in origin[key] if value not in before[key]]
    save_json(path, origin)
    for line in skipped:
        print(line, file=sys.stderr)
    print(f"{len(results)} results, {len(skipped)} skipped or missing")
    if skipped and config.strict:
        raise UserError(f"{len(skipped)} results skipped or missing, and --strict was given; they are named above.")
    print(config.output_dir)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
