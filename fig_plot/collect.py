"""Turn results/** into the tidy CSV files behind figures and findings.

    python -m fig_plot.collect                                            # results/ -> results/tables/
    make figures TABLES=results/tables FIGURES=results/figures            # draws them
    python -m fig_plot.collect --results_dir results/study/smollm2 --output_dir fig_plot/data/smollm2 --keep

Reads the JSON results of the scripts at any depth; those below results/study/ and results/benchmarks/ only if
--results_dir names such a folder. Names and skips unfinished, damaged and foreign files, and deletes nothing. Writes:

    scores.csv      model, dataset, seed, subspace and order of V, coordinates: the run's score, its null, its probe
    layers.csv.gz   the same, layer and fraction: the scores (none after LoRA; of random V at the middle layer only)
    features.csv    model, dataset, seed, layer: scores of pooled training states, without U and V, if meaningful
    probes.csv      model, dataset, seed, layer: scikit-learn's probes on both splits
    training.csv    model, dataset, seed, method: scores on test at the last step
    datasets.csv    dataset: rows, classes, majority share, bag of words
    models.csv      model: parameters, and for the docstring LMs their held-out loss
    alignment.csv, separability.csv   the words of alignment_vis.py, and how far their categories are apart
    sources.json    the command, library versions, commits
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fig_plot.tables import ADAPTED, COLLECTED, read_table, save_csv, table_path
from utils.algebra.scores import SCORES, option_suffix
from utils.models.table import MODELS, local_fingerprint
from utils.results import read_stored, save_json
from utils.script import ROOT, UserError, run_script

ROW_KEYS = (  # tell the rows of a table apart, and sort them
    *("model", "dataset", "seed", "method", "split", "eigenvectors", "coordinates", "subspace", "center"),
    *("num_components", "layer", "fraction", "space", "group", "word"),
)
METHODS = ("linear_training", "lora", "full_finetuning", "from_scratch")
LEFT_OUT = ("study", "benchmarks")  # folders below --results_dir that collect.py does not search
Row = dict[str, Any]
NamedRows = Iterator[tuple[str, Row]]  # the name of a table, and a row of it


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    results_dir: Path = Path("results")  # folder to search at any depth, except its study/ and benchmarks/
    output_dir: Path | None = None  # folder of the CSV files; by default tables/ in --results_dir
    keep: bool = False  # keep old rows that no new result replaces: for a study collected in several pieces


# ------------------------------------------------------------------ one result -> rows
def shown_name(name: str) -> str:
    """The name a reader knows from the name on disk: `Qwen__Qwen2-0.5B` -> `Qwen/Qwen2-0.5B`."""
    return name.replace("__", "/")


def ntps_rows(path: Path, result: Row) -> NamedRows:
    """Yields rows of scores.csv, layers.csv.gz and features.csv from a result of K_sweep.py."""
    config, layers = result["config"], result["layers"]
    folder = path.stem.removesuffix(option_suffix(config))
    keys = {"model": shown_name(path.parent.name), "dataset": shown_name(folder), "seed": config["seed"]}
    adapter = path.parents[2] / "lora" / path.parent.name.removesuffix(ADAPTED) / folder / "adapter"
    has_adapter = config["adapter_dir"] and adapter.is_dir()
    if has_adapter and not result["moments"]["model_fingerprint"].endswith(local_fingerprint(adapter)):
        raise UserError(f"{path} scores an earlier adapter than {adapter}. Run: lora_finetuning.py --ntps_after")
    options = {name: config[name] for name in ("split", "eigenvectors", "coordinates", "subspace", "center")}
    row = {**keys, **options, **{name: result[name] for name in ("num_samples", "num_classes", "hidden_size")}}
    row |= {name: layers[-1][name] for name in ("layer", "rank_u", "rank_v", "rank_label")}
    for name in SCORES:
        score = result["score"][name]
        row |= {name if key == "value" else f"{name}_{key}": value for key, value in score.items()}
    yield "scores", row | {name: value for name, value in layers[-1].items() if name.startswith("probe_")}
    if keys["model"].endswith(ADAPTED):
        return
    for layer in {"autoregression": layers, "random": [layers[len(layers) // 2]]}.get(config["subspace"], []):
        for index, fraction in enumerate(result["fractions"]):
            scores = {name: layer[name] and layer[name][index] for name in (*SCORES, "chance")}
            yield "layers", {**keys, **options, "layer": layer["layer"], "fraction": fraction, **scores}
    for layer in layers if config["split"] == "train" else ():
        if found := layer.get("closed_form"):
            values = {name: score["value"] for name, score in found.items() if not score["meaningless"]}
            yield "features", {**keys, "layer": layer["layer"], **values}


def sklearn_rows(path: Path, result: Row) -> NamedRows:
    """Yields rows of probes.csv, and a row of datasets.csv, from a result of linear_sklearn.py."""
    of_dataset = {"dataset": shown_name(path.stem), "seed": result["config"]["seed"]}
    for layer in result["layers"]:
        scores = {f"{split}_{name}": value for split in ("train", "test") for name, value in layer[split].items()}
        yield "probes", {"model": shown_name(path.parent.name), **of_dataset, "layer": layer["layer"], **scores}
    row = {**of_dataset, "num_classes": result["num_classes"]}
    row |= {f"num_{split}": number for split, number in result["num_samples"].items()}
    for name, scores in result["baselines"].items():
        kept = [score for score in ("accuracy", "balanced_accuracy", "r2") if score in scores]
        row |= {f"{name}_{score}": scores[score] for score in kept}
    yield "datasets", row


def training_rows(path: Path, result: Row) -> NamedRows:
    """Yields a row of training.csv from the metrics of a training run."""
    config, folder = result["config"], path.parent
    row = {"model": shown_name(folder.parent.name), "dataset": shown_name(folder.name), "seed": config["seed"]}
    row |= {"method": folder.parent.parent.name, "learning_rate": config["learning_rate"]}
    if config.get("standardize"):  # a converged probe, beside the paper's own
        row |= {"dataset": row["dataset"].removesuffix(".standardized"), "method": "linear_training_converged"}
    row |= {name: result[name] for name in ("num_train", "num_steps", "texts_per_step", "num_trained_parameters")}
    row |= {name: value for name, value in result["last"].items() if name.startswith("test_")}
    yield "training", row | {"train_loss": result["last"]["train_loss"], "seconds": round(result["seconds"], 1)}


def alignment_rows(path: Path, result: Row) -> NamedRows:
    """Yields rows of alignment.csv and of separability.csv from a result of alignment_vis.py."""
    config = result["config"]
    keys = {"model": shown_name(path.parent.name), "dataset": shown_name(path.name.rpartition(".layer")[0])}
    keys |= {name: config[name] for name in ("split", "center", "num_components", "layer")}
    yield from (("alignment", {**keys, **word}) for word in result["words"])
    for space, described in result["subspaces"].items():
        for group, measures in described["separability"].items():
            numbers = {f"{name}_{key}": value for name, found in measures.items() for key, value in found.items()}
            yield "separability", {**keys, "space": space, "group": group, **numbers}


def model_row(name: str, model_name: str) -> Row:
    """A row of models.csv, from pretraining.json if the model has one, else from the table of known models."""
    spec = MODELS.get(model_name)
    report_path = ROOT / (spec.path if spec else model_name) / "pretraining.json"
    if report_path.is_file():
        report = read_stored(report_path)
        fields = ("num_parameters", "held_out_loss", "unigram_loss", "tokens_seen", "seconds")
        return {"model": name, **{field: report[field] for field in fields}}
    size = spec and float(spec.parameters[:-1]) * {"M": 1e6, "B": 1e9}[spec.parameters[-1]]
    return {"model": name, "num_parameters": size}


def used_rows(result: Row) -> dict[str, str]:
    """The fingerprint of the rows that a result used, by split."""
    if "moments" in result:
        return {result["config"]["split"]: result["moments"]["fingerprint"]}
    return result.get("fingerprints") or {split: result[f"{split}_fingerprint"] for split in ("train", "test")}


# ------------------------------------------------------------------ all results -> tables
READERS: dict[str, Callable[[Path, Row], NamedRows]] = {
    "ntps": ntps_rows,
    "linear_sklearn": sklearn_rows,
    "alignment": alignment_rows,
    **dict.fromkeys(METHODS, training_rows),
}


def result_files(results_dir: Path) -> Iterator[tuple[str, Path]]:
    """Yields the kind and path of each result: a JSON file, or metrics.json of a finished training run."""
    for kind in READERS:
        folders = (path for path in results_dir.rglob(kind) if path.is_dir())
        for folder in sorted(path for path in folders if path.relative_to(results_dir).parts[0] not in LEFT_OUT):
            for path in sorted(folder.glob("*/*/metrics.json" if kind in METHODS else "*/*.json")):
                yield kind, path


def read_all(results_dir: Path) -> tuple[dict[str, list[Row]], list[Row], list[str]]:
    """The rows of each table, with their file as `path`; each result's environment; and a sentence per skipped file."""
    tables: dict[str, list[Row]] = {name: [] for name in COLLECTED}
    used, environments, skipped, model_names = [], [], [], dict[str, str]()
    for kind, path in result_files(results_dir):
        try:
            result = read_stored(path)
            added = list(READERS[kind](path, result))
            keys = {"dataset": added[0][1]["dataset"], "seed": result["config"]["seed"], "path": path}
            used += [{**keys, "split": split, "rows": rows} for split, rows in used_rows(result).items()]
            model_names[added[0][1]["model"]] = result["config"]["model_name"]
            environments.append(result["environment"])
        except UserError as error:
            skipped.append(f"skipped: {error}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            skipped.append(f"skipped: {path} is not a result of {kind} ({type(error).__name__}: {error})")
        else:
            for table, row in added:
                tables[table].append({**row, "path": path})
    if used:
        to_table("training or test rows", used)  # raises UserError: scripts used different rows of one dataset
    known = sorted(names for names in model_names.items() if not names[0].endswith(ADAPTED))
    tables["models"] = [{**model_row(*names), "path": results_dir} for names in known]
    return tables, environments, skipped


def to_table(name: str, rows: list[Row]) -> pd.DataFrame:
    """The rows of `read_all` in the order of their keys, each once; raises UserError if two of the same keys differ.

    Every model's result repeats the baselines of its dataset; if machines round these differently, the first counts.
    """
    table = pd.DataFrame(rows)
    keys = [key for key in ROW_KEYS if key in table]
    compared = [column for column in table if column in keys or column.startswith("num_") or name != "datasets"]
    table = table.drop_duplicates([column for column in compared if column != "path"])
    twice = table[table.duplicated(keys, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        second = twice[(twice[keys] == first[keys]).all(axis=1)].iloc[1]
        which = ", ".join(f"{key} {value}" for key, value in first[keys].items())
        raise UserError(f"{name}: two different results of {which}: {first['path']} and {second['path']}. Make one "
                        "of them again with --overwrite, or name one of their folders with --results_dir.")  # fmt: skip
    return in_order(table.drop(columns="path"))


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows sorted by their keys; rows that differ only in the word keep their order."""
    return table.sort_values([key for key in ROW_KEYS if key in table and key != "word"], kind="stable")


def with_rows_of(name: str, data_dir: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table, and rows of its old file with other keys, sorted by their keys."""
    if not table_path(name, data_dir).is_file():
        return table
    both = pd.concat([table, read_table(name, data_dir)], ignore_index=True)
    keys = [key for key in ROW_KEYS if key in both]
    as_written = both[keys].map(lambda value: f"{value:.6g}" if isinstance(value, float) else value)
    return in_order(both[~as_written.duplicated()])


def save_sources(path: Path, environments: list[Row], config: Config) -> None:
    """Writes the sources of the numbers: the command, and each environment once, with its commit."""
    sources: Row = read_stored(path) if config.keep and path.is_file() else {"environments": []}
    sources["command"] = f"python -m fig_plot.collect --results_dir {config.results_dir}{' --keep' * config.keep}"
    for environment in environments:
        if environment not in sources["environments"]:
            sources["environments"].append(environment)
    save_json(path, sources)


def main(config: Config) -> None:
    """Writes the tables, and prints a line for each skipped file; raises UserError if it finds no result."""
    output_dir = config.output_dir or config.results_dir / "tables"
    rows, environments, skipped = read_all(config.results_dir)
    if not environments:
        found = f"; {len(skipped)} skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"No results under {config.results_dir}{found}. Make some: python cache.py, python K_sweep.py")
    tables = {name: to_table(name, of_table) for name, of_table in rows.items() if of_table}
    if config.keep:  # reads all old files before it writes one: a damaged file leaves the others unchanged
        tables = {name: with_rows_of(name, output_dir, table) for name, table in tables.items()}
    for name in rows:
        path = table_path(name, output_dir)
        if name in tables:
            save_csv(path, tables[name])
            print(f"{len(tables[name]):7,} rows  {path}")
        elif path.is_file():
            print(f"older: {path} is of an earlier run; no result found now has such rows", file=sys.stderr)
    save_sources(output_dir / "sources.json", environments, config)
    for line in skipped:
        print(line, file=sys.stderr)
    print(f"{len(environments)} results, {len(skipped)} skipped")
    places = shlex.quote(f"TABLES={output_dir}"), shlex.quote(f"FIGURES={output_dir.parent / 'figures'}")
    print("Draw them: make figures", *places)
    print(output_dir)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
