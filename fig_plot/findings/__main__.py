"""Compute the tables that answer the questions of docs/findings.md: does NTPS predict?

    python -m fig_plot.findings                               # every study at or below fig_plot/data/
    python -m fig_plot.findings --tables_dir results/tables   # your own

Reads the CSV files of collect.py. Writes beside them, for each study, findings_<name>.csv:

    like_for_like       question 1: the paper's procedure, and the rest of its correlation step by step
    correlations        question 2: each score and baseline with each measure, across tasks and across models
    leads               question 2: each score beside the best baseline
    partial             correlations with the headroom or the number of classes held fixed
    controls            question 3: scores of V by PCA, of a random V and of random weights
    after_lora          question 4
    calibration         question 5: error of the LoRA gain predicted from a score, in points of accuracy
    decision            question 5: AUC of "LoRA gains more than two points"
    seeds               question 6: spread between seeds beside that over tasks
    layer_choice        question 8: the layer that each score chooses; ridge R2 if prescreen/ has results
    random_weights      asked later: random weights on the same tasks, before and after LoRA
    twin                asked later: the paper's procedure with the scores of random weights
    like_for_like_paper, correlations_paper    asked later: questions 1 and 2 on the paper's own datasets

and over the models of all studies, in --tables_dir itself:

    which_model         question 7: share of datasets on which a score orders two models as the outcome does
    special             question 9: `retained` minus random V per model, and its sign in two models
    coordinates         question 10: each score in every scaling of the coordinates, at the last two layers
    first_choice        test of prescreen.py, by its results in prescreen/: its choices, and the points that they lose

A correlation across models is the mean of those within each task. Models with random weights have tables
of their own, and rows among the controls and the changes by LoRA; all other tables leave them out.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fig_plot.findings import comparisons, procedure, questions
from fig_plot.findings.correlations import Draws
from fig_plot.tables import (
    CELL_KEYS,
    DATA_DIR,
    FEATURE_SCORES,
    MEASURES,
    SEED_KEYS,
    average_seeds,
    find_studies,
    load_after_lora,
    load_seeds,
    read_table,
    save_csv,
    table_path,
    trained_models,
)
from utils.data.table import PAPER_KEYS
from utils.results import read_stored
from utils.script import run_script
from utils.settings import check

Tables = dict[str, Iterable]  # name -> its rows, which `write_tables` computes


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    tables_dir: Path = DATA_DIR  # every study at or below it
    num_draws: int = 10_000  # bootstrap samples of the tasks
    num_permutations: int = 1000  # permutations for the selection null
    seed: int = 0  # seed of both

    def __post_init__(self) -> None:
        check(self, "at least 1", "num_draws", "num_permutations")
        check(self, "from 0 to 4294967295", "seed")


def train_layers(data_dir: Path) -> pd.DataFrame:
    """The rows of layers.csv.gz on training rows without centring."""
    layers = read_table("layers", data_dir)
    return layers[(layers["split"] == "train") & ~layers["center"]]


def comparison_tables(studies: Collection[Path], screened: Collection[dict[str, Any]], draws: Draws) -> Tables:
    """The tables over the models of all studies; if two studies share a model and dataset, the first counts.

    `screened` are results of prescreen.py. Models are compared on the rows of the first seed, which all have.
    """
    cells, first, layers, layer_keys = [], [], [], [*CELL_KEYS, "coordinates", "subspace", "layer"]
    probes, datasets = ([read_table(name, path) for path in studies] for name in ("probes", "datasets"))
    for data_dir, probes_of_study in zip(studies, probes, strict=True):
        seeds = load_seeds(data_dir)
        cells.append(trained_models(average_seeds(seeds)))
        of_first = seeds[seeds["seed"] == seeds["seed"].min()]
        best = probes_of_study.groupby(SEED_KEYS)["test_accuracy"].max().rename("best_test_accuracy")
        first.append(trained_models(of_first.merge(best, on=SEED_KEYS, how="left")))
        of_largest = train_layers(data_dir).query("eigenvectors == 'largest'")
        layers.append(of_largest.groupby(layer_keys, as_index=False).mean(numeric_only=True))
    every, compared = (pd.concat(tables, ignore_index=True).drop_duplicates(CELL_KEYS) for tables in (cells, first))
    every_layer = pd.concat(layers, ignore_index=True).drop_duplicates(layer_keys)
    return {
        "which_model": comparisons.which_model_rows(compared, draws),
        "special": comparisons.special_rows(comparisons.lead_of_layers(every, every_layer), draws),
        "coordinates": comparisons.coordinate_rows(every_layer, every, draws),
        "first_choice": comparisons.first_choice_rows(screened, pd.concat(probes), pd.concat(datasets)),
    }


def study_tables(data_dir: Path, screened_layers: pd.DataFrame, draws: Draws) -> Tables:
    """Every table of a study; `screened_layers` has ridge R2 of each layer by prescreen.py."""
    seeds, layers = load_seeds(data_dir), train_layers(data_dir)
    layers = layers[(layers["coordinates"] == "as_is") & (layers["subspace"] == "autoregression")]
    probes, after, every = read_table("probes", data_dir), load_after_lora(data_dir), average_seeds(seeds)
    cells = trained_models(every)
    first = seeds["seed"].min()  # the paper has one run of everything
    of_cells, of_layers, of_probes = (
        table[table["seed"] == first] for table in (trained_models(seeds), layers, probes)
    )
    rows: Tables = {
        "like_for_like": procedure.like_for_like_rows(of_cells, of_layers, of_probes, draws),
        "correlations": questions.correlation_rows(cells, draws),
        "leads": questions.lead_rows(cells, draws),
        "partial": questions.partial_rows(cells, draws, (*questions.RUN_SCORES, *questions.CONTROLS, *FEATURE_SCORES)),
        "controls": questions.control_rows(every, draws),
        "random_weights": questions.random_weights_rows(seeds, after, draws),
        "twin": procedure.twin_rows(of_cells, of_layers, of_probes, draws),
        "after_lora": questions.after_lora_rows(after, seeds, draws),
        "calibration": questions.calibration_rows(cells, draws),
        "decision": questions.decision_rows(cells, draws),
        "seeds": questions.seed_rows(seeds),
    }
    of_cells = of_cells[of_cells["dataset"].isin(PAPER_KEYS)]
    if 4 <= of_cells["dataset"].nunique() < cells["dataset"].nunique():
        of_layers, of_probes = (table[table["dataset"].isin(PAPER_KEYS)] for table in (of_layers, of_probes))
        rows["like_for_like_paper"] = procedure.like_for_like_rows(of_cells, of_layers, of_probes, draws)
        columns = [name for name in (*CELL_KEYS, "ntps", *MEASURES, *questions.RIVALS) if name in cells]
        its_cells = cells.loc[cells["dataset"].isin(PAPER_KEYS), columns]
        rows["correlations_paper"] = questions.correlation_rows(its_cells, draws)
    if table_path("features", data_dir).is_file():
        by_layer = questions.scores_by_layer(layers, read_table("features", data_dir), probes, screened_layers)
        rows["layer_choice"] = questions.layer_choice_rows(by_layer, draws)
    return rows


def write_tables(data_dir: Path, tables: Tables) -> None:
    """Computes all tables of a study, then writes those that have rows, and prints how many."""
    for name, table in {name: pd.DataFrame(rows) for name, rows in tables.items()}.items():
        path = table_path(f"findings_{name}", data_dir)
        if not table.empty:
            save_csv(path, table)
            print(f"{len(table):7,} rows  {path}")
        elif path.is_file():
            print(f"{path} is from an earlier run; this run has no such rows")
    print(data_dir)


def main(config: Config) -> None:
    """Writes the tables of every study, and the tables over all studies."""
    draws = Draws(config.num_draws, config.seed, config.num_permutations)
    studies = find_studies(config.tables_dir)
    screened = [read_stored(path) for path in sorted((config.tables_dir / "prescreen").glob("*.json"))]
    screened_layers = comparisons.screened_layers(screened)
    for data_dir in studies:
        write_tables(data_dir, study_tables(data_dir, screened_layers, draws))
    write_tables(config.tables_dir, comparison_tables(studies, screened, draws))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
