"""Does NTPS predict? The tables that answer the questions of docs/findings.md.

    python -m fig_plot.findings                               # every study at or below fig_plot/data/
    python -m fig_plot.findings --tables_dir results/tables   # your own
    python -m fig_plot.findings --published    # the paper's numbers, from fig_plot/published/ (import_published.py)

Reads the CSV files of collect.py. Writes beside them, for each study:

    findings_like_for_like.csv  question 1: the paper's procedure, and what is left step by step
    findings_like_for_like_paper.csv, findings_correlations_paper.csv
                                questions 1 and 2 on the paper's own datasets alone, asked later
    findings_selection.csv      the same on test rows, and the choice judged on a task left out
    findings_sensitivity.csv    correlation at every layer and K
    findings_correlations.csv   question 2: each score and baseline with each measure, across tasks and across models
    findings_leads.csv          question 2: each score beside the best baseline
    findings_partial.csv        correlations with the headroom or the number of classes held fixed
    findings_controls.csv       question 3: what V by PCA, a random V, random weights and permuted labels give
    findings_random_weights.csv what random weights give on the same tasks and LoRA makes of them, asked later
    findings_twin.csv           the paper's procedure with the scores of random weights in place of the model's
    findings_after_lora.csv     question 4
    findings_calibration.csv    question 5: error of the LoRA gain predicted from a score, in points of accuracy
    findings_decision.csv       question 5: AUC of "LoRA gains more than two points"
    findings_seeds.csv          question 6: spread between seeds beside that over tasks
    findings_layer_choice.csv   question 8: the layer that each score chooses
    findings_shared_tasks.csv   the tasks that it shares with the study of --tables_dir itself: of task or model?

and over the models of all studies, in --tables_dir itself:

    findings_which_model.csv    question 7: share of datasets on which a score orders two models as the outcome does
    findings_special.csv        question 9: `retained` minus random V per model, and its sign in two models
    findings_coordinates.csv    question 10: each score in every scaling of the coordinates, at the last two layers

A correlation across models is within each task, averaged over tasks. Models with random weights have tables of their
own and rows among the controls and the changes by LoRA; they are left out of all else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fig_plot.findings.comparisons import (
    best_test_accuracy,
    coordinate_rows,
    lead_of_layers,
    special_rows,
    which_model_rows,
)
from fig_plot.findings.correlations import Draws
from fig_plot.findings.procedure import like_for_like_rows, selection_rows, sensitivity_rows, twin_rows
from fig_plot.findings.published import published_tables
from fig_plot.findings.questions import (
    RIVALS,
    after_lora_rows,
    calibration_rows,
    control_rows,
    correlation_rows,
    decision_rows,
    layer_choice_rows,
    lead_rows,
    of_every_layer,
    partial_rows,
    random_weights_rows,
    seed_rows,
    shared_task_rows,
)
from fig_plot.tables import (
    CELL_KEYS,
    CONTROLS,
    DATA_DIR,
    FEATURE_SCORES,
    MEASURES,
    RUN_SCORES,
    average_seeds,
    find_studies,
    load_after_lora,
    load_cells,
    load_seeds,
    read_table,
    save_csv,
    table_path,
    trained_models,
    without_random_weights,
)
from utils.data.table import PAPER_KEYS
from utils.script import run_script
from utils.settings import check


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    published: bool = False  # the paper's numbers instead of the studies
    tables_dir: Path | None = None  # every study at or below it; by default fig_plot/data/ or fig_plot/published/
    num_draws: int = 10_000  # bootstrap samples of the tasks
    num_permutations: int = 1000  # of the selection null
    seed: int = 0  # of both

    def __post_init__(self) -> None:
        check(self, "from 0 to 4294967295", "seed")


def plain_layers(data_dir: Path) -> pd.DataFrame:
    """Rows of layers.csv.gz of V by autoregression, solved on training rows as they are."""
    layers = train_layers(data_dir)
    return layers[(layers["coordinates"] == "as_is") & (layers["subspace"] == "autoregression")]


def train_layers(data_dir: Path) -> pd.DataFrame:
    """Rows of layers.csv.gz that were solved on training rows, not centred."""
    layers = read_table("layers", data_dir)
    return layers[(layers["split"] == "train") & ~layers["center"]]


def comparison_tables(studies: Iterable[Path], draws: Draws) -> dict[str, pd.DataFrame]:
    """The tables over the models of all studies; of a model and dataset that two studies have the first counts."""
    cells, layers = [], []
    for data_dir in studies:
        best = best_test_accuracy(read_table("probes", data_dir))
        cells.append(trained_models(load_cells(data_dir)).merge(best, on=CELL_KEYS, how="left"))
        of_largest = train_layers(data_dir).query("eigenvectors == 'largest'")
        layers.append(of_largest.groupby([*CELL_KEYS, "coordinates", "subspace", "layer"], as_index=False).mean(
            numeric_only=True))  # fmt: skip
    every = pd.concat(cells, ignore_index=True).drop_duplicates(CELL_KEYS)
    every_layer = pd.concat(layers, ignore_index=True)
    every_layer = every_layer.drop_duplicates([*CELL_KEYS, "coordinates", "subspace", "layer"])
    as_is = without_random_weights(every_layer.query("coordinates == 'as_is'"))
    rows: dict[str, Iterable] = {
        "which_model": which_model_rows(every, draws),
        "special": special_rows(lead_of_layers(every, as_is), draws),
        "coordinates": coordinate_rows(every_layer.query("subspace == 'autoregression'"), every, draws),
    }
    return {name: pd.DataFrame(table_rows) for name, table_rows in rows.items()}


def study_tables(data_dir: Path, draws: Draws, others: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """Every table of a study; `others` are the cells of a study to compare shared tasks with."""
    seeds = load_seeds(data_dir)
    every = average_seeds(seeds)
    layers, probes, after = plain_layers(data_dir), read_table("probes", data_dir), load_after_lora(data_dir)
    cells = trained_models(every)
    first = seeds["seed"].min()  # the paper has one run of everything
    studied = trained_models(seeds)
    of_first = studied[studied["seed"] == first], layers[layers["seed"] == first], probes[probes["seed"] == first]
    rows: dict[str, Iterable] = {
        "like_for_like": like_for_like_rows(*of_first, draws),
        "selection": selection_rows(cells, layers, draws),
        "sensitivity": sensitivity_rows(cells, layers),
        "correlations": correlation_rows(cells, draws),
        "leads": lead_rows(cells, draws),
        "partial": partial_rows(cells, draws, (*RUN_SCORES, *CONTROLS, *FEATURE_SCORES)),
        "controls": control_rows(every, draws),
        "random_weights": random_weights_rows(every, after, draws),
        "twin": twin_rows(*of_first, draws),
        "after_lora": after_lora_rows(after, every, draws),
        "calibration": calibration_rows(cells, draws),
        "decision": decision_rows(cells, draws),
        "seeds": seed_rows(seeds),
    }
    of_cells, of_layers, of_probes = (table[table["dataset"].isin(PAPER_KEYS)] for table in of_first)
    if 4 <= of_cells["dataset"].nunique() < cells["dataset"].nunique():
        rows["like_for_like_paper"] = like_for_like_rows(of_cells, of_layers, of_probes, draws)
        columns = [name for name in (*CELL_KEYS, "ntps", *MEASURES, *RIVALS) if name in cells]
        rows["correlations_paper"] = correlation_rows(cells.loc[cells["dataset"].isin(PAPER_KEYS), columns], draws)
    if table_path("features", data_dir).is_file():
        every_layer = of_every_layer(layers, read_table("features", data_dir), probes)
        rows["layer_choice"] = layer_choice_rows(every_layer, draws)
    if others is not None:
        rows["shared_tasks"] = shared_task_rows(cells, others, draws)
    return {name: pd.DataFrame(table_rows) for name, table_rows in rows.items()}


def write_tables(data_dir: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Writes the tables of a study that have rows, and prints how many."""
    for name, table in tables.items():
        path = table_path(f"findings_{name}", data_dir)
        if not table.empty:
            save_csv(path, table)
            print(f"{len(table):7,} rows  {path}")
        elif path.is_file():
            print(f"{path} is of an earlier run; nothing found now has such rows")
    print(data_dir)


def main(config: Config) -> None:
    """Writes the tables of the published numbers, or of every study."""
    draws = Draws(config.num_draws, config.seed, config.num_permutations)
    if config.published:
        data_dir = config.tables_dir or DATA_DIR.with_name("published")
        write_tables(data_dir, published_tables(data_dir, draws))
        return
    tables_dir = config.tables_dir or DATA_DIR
    others, studies = None, find_studies(tables_dir)
    for data_dir in studies:
        write_tables(data_dir, study_tables(data_dir, draws, others))
        if data_dir == tables_dir:
            others = trained_models(load_cells(data_dir))
    write_tables(tables_dir, comparison_tables(studies, draws))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
