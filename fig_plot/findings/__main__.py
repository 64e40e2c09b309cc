"""Does NTPS predict? Six questions to a real LLM, fixed before its results existed, and what the study says to them.

    python -m fig_plot.findings                # the committed studies, from fig_plot/data/
    python -m fig_plot.findings --published    # the paper's numbers, from fig_plot/published/ (import_published.py)

QUESTIONS, FIXED BEFORE LOOKING. They are asked of SmolLM2-135M (`smollm2`) on ten of the paper's twelve datasets and
four more; the ladder of docstring LMs is asked the same by the same code. Terms:

    score         mean over the fractions 5 %, ..., 95 % at the last layer, V and U solved on the training rows
    accuracy      of the logistic probe of the last layer (linear_sklearn.py), on test rows
    headroom      1 - accuracy
    best layer    the one with the highest LogME, which sees training rows only
    LoRA gain     test accuracy after LoRA - accuracy; where another probe is meant, it is named
    noise         the same procedure with the tasks permuted, 1,000 times
    interval      95 %, bootstrap over tasks; seeds of a task are averaged first. 1,000 draws were planned, and are
                  10,000: with 1,000 an end moved by some .03 from one seed to the next
    baselines     number of classes, bag of words, the same score of a random V; for LoRA gain also headroom and the
                  best layer's probe, which for accuracy are the outcome itself

Each correlation is Spearman's across the tasks of a model, averaged over models where there are several. The paper
claims + for accuracy, - for MSE, - for LoRA gain; every choice and every test is made in that direction.

1. Like for like: does the paper's procedure give its three correlations on another model? Score: `ntps`, V of the
   largest eigenvalues, at every layer and fraction; measures: accuracy and MSE on the TRAINING rows of the same
   layer's probe, and LoRA gain over the paper's probe and over a converged one. Statistic: the best correlation over
   layer and K in the claimed direction. It is reproduced if it lies within the range of the eight published ones or
   beyond; it is more than choosing if p < .05 against noise. Then one step at a time: last layer; last layer and mean
   over K; the same on test rows. One seed, as in the paper. If the number of classes, held fixed (partial Spearman),
   takes the MSE's correlation to where its interval has 0, that is said with it.
2. By the fixed rule on test rows, which scores order tasks by accuracy, by accuracy above the majority class, by MSE
   / variance, by LoRA gain over a converged probe? `ntps` is the claim, all other scores are asked beside it. A score
   orders tasks if its interval lies on the claimed side of 0 (no side was claimed for other scores: then on either
   side). It is of use if the interval of its lead over the best baseline, in the size of the correlation, is above 0.
3. Does next-token prediction's V keep more of the labels than random subspaces of the same dimension? Score:
   `retained` minus its mean over 20 random V; z: the same in standard deviations of the draws. Yes if the interval of
   the mean over tasks is above 0, no if it is below; the number of tasks with z above 2 and below -2 is given, V by
   PCA beside it.
4. Does LoRA raise NTPS, its variants, and `retained` over a random V, and does the rise follow the gain? Statistic:
   score after minus before, mean over tasks; Spearman of that change with LoRA gain. Raised, or following, if the
   interval is above 0. Unanswered, not "no", if it has 0 inside.
   Of random weights, asked later but before they were trained: LoRA on the twin of random weights, in the same words.
   Statistic: the change of each score on the model less that on its twin, mean over the tasks of both. A rise is of
   what was learnt before LoRA if this interval is above 0; it is of fitting the labels, to whatever weights, if the
   twin's score rises too and the interval holds 0. Accuracies of both are given beside it.
5. What predicts the LoRA gain of a task left out? Candidates, one at a time: headroom; held-out R2 of the best layer
   minus that of the last; ridge R2; LogME; H-score; z of `retained`; `retained` minus that of random V; `ntps`;
   number of classes. Statistic: mean absolute error, in points, of a least-squares line through the other tasks (an
   intercept per model), beside that of the other tasks' mean gain. A candidate predicts if the interval of its lead
   over the mean gain is above 0. And the AUC for "gain > 2 points", with interval, beside headroom's here and
   headroom's .79 in the published numbers.
6. Is a score reproducible against its spread over tasks? Standard deviation between seeds (other rows, other initial
   weights) over the standard deviation over tasks, and the largest difference over batches and precision of products
   over the same. Reproducible if the share is below one tenth.

The number of tasks is given with every answer; a question whose data are missing stays unanswered.

Reads the CSV files of collect.py. Writes findings_*.csv beside them (like_for_like.py, fixed_rule.py, subspaces.py,
gains.py, layer_choice.py and shared_tasks.py say what is in them):

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
    findings_layer_choice.csv   which score finds the layer that is read best, asked later
    findings_seeds.csv          question 6: spread between seeds beside that over tasks
    findings_shared_tasks.csv   SmolLM2 on docstring tasks beside the docstring LMs, asked later: of task or model?

A correlation across models is within each task, averaged over tasks. Models with random weights have tables of their
own and rows among the controls and the changes by LoRA; they are left out of all else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fig_plot.collect import save_csv
from fig_plot.findings.correlations import Draws
from fig_plot.findings.fixed_rule import RIVALS, correlation_rows, lead_rows, partial_rows, seed_rows
from fig_plot.findings.gains import calibration_rows, decision_rows
from fig_plot.findings.layer_choice import layer_choice_rows, of_every_layer
from fig_plot.findings.like_for_like import like_for_like_rows, selection_rows, sensitivity_rows, twin_rows
from fig_plot.findings.shared_tasks import shared_task_rows
from fig_plot.findings.subspaces import after_lora_rows, control_rows, random_weights_rows
from fig_plot.published import published_tables
from fig_plot.tables import (
    ALL_STUDIES,
    CONTROLS,
    DATA_DIR,
    FEATURE_SCORES,
    KEYS,
    MEASURES,
    PUBLISHED_DIR,
    SCORES,
    average_seeds,
    load_after_lora,
    load_cells,
    load_seeds,
    present_studies,
    read_table,
    study_dir,
    trained_models,
)
from utils.data.table import PAPER_KEYS
from utils.script import run_script

ON_TEST = ("probe_accuracy", "probe_mse", "lora_gain_paper", "lora_gain")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    published: bool = False  # the paper's numbers instead of the studies
    data_dir: Path | None = None  # of one study; by default all in fig_plot/data/, with --published fig_plot/published/
    num_draws: int = 10_000  # bootstrap samples of the tasks
    num_permutations: int = 1000  # of the selection null
    seed: int = 0  # of both


def study_tables(data_dir: Path, draws: Draws) -> dict[str, pd.DataFrame]:
    """Every table of a study."""
    seeds = load_seeds(data_dir)
    every = average_seeds(seeds)
    layers, probes = read_table("layers", data_dir), read_table("probes", data_dir)
    layers = layers[layers["split"] == "train"]
    cells = trained_models(every)
    after = load_after_lora(data_dir)
    first = seeds["seed"].min()  # the paper has one run of everything
    cells_of_first, layers_of_first, probes_of_first = (
        table[table["seed"] == first] for table in (trained_models(seeds), layers, probes)
    )
    rows: dict[str, Iterable] = {
        "like_for_like": like_for_like_rows(cells_of_first, layers_of_first, probes_of_first, draws),
        "selection": selection_rows(cells, layers, draws, ON_TEST),
        "sensitivity": sensitivity_rows(cells, layers),
        "correlations": correlation_rows(cells, draws),
        "leads": lead_rows(cells, draws),
        "partial": partial_rows(cells, draws, (*SCORES, *CONTROLS, *FEATURE_SCORES)),
        "controls": control_rows(every, draws),
        "random_weights": random_weights_rows(every, after, draws),
        "twin": twin_rows(cells_of_first, layers_of_first, probes_of_first, draws),
        "after_lora": after_lora_rows(after, every, draws),
        "calibration": calibration_rows(cells, draws),
        "decision": decision_rows(cells, draws),
        "seeds": seed_rows(seeds),
    }
    of_paper, layers_of_paper, probes_of_paper = (
        table[table["dataset"].isin(PAPER_KEYS)] for table in (cells_of_first, layers_of_first, probes_of_first)
    )
    if 4 <= of_paper["dataset"].nunique() < cells["dataset"].nunique():
        rows["like_for_like_paper"] = like_for_like_rows(of_paper, layers_of_paper, probes_of_paper, draws)
        columns = [name for name in (*KEYS, "ntps", *MEASURES, *RIVALS) if name in cells]
        rows["correlations_paper"] = correlation_rows(cells.loc[cells["dataset"].isin(PAPER_KEYS), columns], draws)
    if (data_dir / "features.csv").is_file():
        every_layer = of_every_layer(layers, read_table("features", data_dir), probes)
        rows["layer_choice"] = layer_choice_rows(every_layer, draws)
    if data_dir.resolve() != DATA_DIR and (DATA_DIR / "scores.csv").is_file():
        rows["shared_tasks"] = shared_task_rows(cells, trained_models(load_cells(DATA_DIR)), draws)
    return {name: pd.DataFrame(table_rows) for name, table_rows in rows.items()}


def print_summary(tables: dict[str, pd.DataFrame]) -> None:
    """Spearman of every score with the main measures, and the smaller tables."""
    spearmans = tables["correlations"].query("correlation == 'spearman'")
    shown = spearmans.assign(
        cell=spearmans.apply(lambda row: f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]", axis=1)
    )
    shown["group"] = shown["direction"]
    if "without" in shown:
        shown["group"] += shown["without"].map(lambda name: f", without {name}" if name else "")
    for group, rows in shown.groupby("group", sort=False):
        print(f"\nSpearman {group}, mean and 95 % interval")
        print(rows.pivot(index="score", columns="measure", values="cell").fillna("").to_string())
    for name, table in tables.items():
        if not name.startswith(("correlations", "sensitivity")) and not table.empty:
            print(f"\n{name}\n{table.round(3).to_string(index=False)}")


def write_tables(data_dir: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Writes and prints the tables of a study."""
    print_summary(tables)
    for name, table in tables.items():
        path = data_dir / f"findings_{name}.csv"
        if table.empty:  # nothing to say, such as of gains where nothing was trained
            path.unlink(missing_ok=True)
        else:
            save_csv(path, table)
    print(data_dir)


def main(config: Config) -> None:
    """Writes the tables of the published numbers, of one study, or of every study that is there."""
    draws = Draws(config.num_draws, config.seed, config.num_permutations)
    if config.published:
        data_dir = config.data_dir or PUBLISHED_DIR
        write_tables(data_dir, published_tables(data_dir, draws))
        return
    studies = (
        [config.data_dir] if config.data_dir else [study_dir(study) for study in present_studies(among=ALL_STUDIES)]
    )
    for data_dir in studies or [DATA_DIR]:  # where there is none, reading says which command makes it
        write_tables(data_dir, study_tables(data_dir, draws))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
