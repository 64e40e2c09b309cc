"""The tables of docs/findings.md and of the README's first screen, written from the CSV files of fig_plot.findings.

    python -m fig_plot.findings.page            # rewrites what stands between <!-- table: ... --> and <!-- end -->
    python -m fig_plot.findings.page --check    # changes nothing; exit code 1 if a page is not what the CSV files say

The words around the tables are written by hand, and hold no number that does not stand in one of them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fig_plot.findings.procedure import STEPS
from fig_plot.findings.questions import CANDIDATES, GAINS, OF_THE_OUTCOME, RIVALS
from fig_plot.tables import (
    CLAIMED,
    DATA_DIR,
    FEW_TASKS,
    LABELS,
    MEASURES,
    find_studies,
    load_cells,
    read_table,
    table_path,
    trained_models,
)
from utils.results import write_atomically
from utils.script import ROOT, UserError, run_script

PAGES = (Path("README.md"), Path("docs/findings.md"))
BLOCK = re.compile(r"(<!-- table: (\w+)(?: of ([\w-]+))? -->\n).*?(<!-- end -->)", flags=re.DOTALL)
# rows of question 2, from top to bottom
ASKED = [name for name in LABELS if name not in (*MEASURES, "ntps_whitened", "majority_accuracy", "num_parameters",
                                                 "held_out_loss", "lora_accuracy")]  # fmt: skip
# a claim -> the measure on training rows, the one on test rows
CLAIMS = {
    "more accurate probe": ("train_accuracy", "probe_accuracy"),
    "smaller error of the probe": ("train_mse", "probe_mse"),
    "smaller gain of LoRA": ("lora_gain_paper", "lora_gain"),
}
Cell = Callable[[pd.Series], str]


@dataclass(frozen=True)
class Config:
    """Nothing to edit."""

    check: bool = False  # write nothing, and fail where something would be written


# ------------------------------------------------------------------ the three claims
class Claim(NamedTuple):
    """The answer of a study to one claim; each row with value, low and high."""

    chosen: pd.Series  # layer and K chosen on training rows, mean over models; also noise and p
    fixed_rule: pd.Series  # last layer, mean over K, test rows
    baseline: pd.Series
    baseline_name: str


def spearmans(data_dir: Path, of: str = "") -> pd.DataFrame:
    """Spearman across tasks under the fixed rule, by measure and score; of the paper's datasets alone with `_paper`."""
    table = read_table(f"findings_correlations{of}", data_dir)
    table = table[(table["correlation"] == "spearman") & (table["direction"] == "across tasks")]
    return table.set_index(["measure", "score"])


def published_range() -> pd.DataFrame:
    """Published correlations across tasks, by measure: mean, min and max over the eight models."""
    table = pd.read_csv(DATA_DIR / "published_correlations.csv", comment="#")
    return table[table["direction"] == "across tasks"].groupby("measure")["spearman"].agg(["mean", "min", "max"])


def answer(claim: str, data_dir: Path, of: str = "") -> Claim:
    """The answer to a claim of `CLAIMS`; on the paper's datasets alone with `_paper`. KeyError: it was not asked."""
    chosen_on, measure = CLAIMS[claim]
    steps = read_table(f"findings_like_for_like{of}", data_dir).set_index(["measure", "model", "step"])
    table = spearmans(data_dir, of).loc[measure]
    rivals = [name for name in RIVALS if name in table.index and (measure in GAINS or name not in OF_THE_OUTCOME)]
    best = str(table.loc[rivals, "value"].abs().idxmax())
    chosen = steps.loc[(chosen_on, "mean", STEPS[0])].rename({"spearman": "value"})
    return Claim(chosen, table.loc["ntps"], table.loc[best], best)


def overview_rows(tables_dir: Path = DATA_DIR) -> pd.DataFrame:
    """A row for each bar of the overview: claim, label, value, low, high, noise, note; positive is as claimed.

    Of the studies that answer every claim.
    """
    rows: list[tuple] = []
    theirs, studies = published_range(), {}
    for study, title in reversed(find_studies(tables_dir).items()):
        for of, words in (("_paper", f"{title}, the paper's datasets"), ("", title)):
            if table_path(f"findings_like_for_like{of}", study).is_file():
                steps = read_table(f"findings_like_for_like{of}", study)
                if {chosen_on for chosen_on, _ in CLAIMS.values()} <= set(steps["measure"]):
                    studies[words] = (study, of)
    for claim, (_, measure) in CLAIMS.items():
        sign = CLAIMED[measure]
        mean, low, high = theirs.loc[measure] * sign
        rows.append((claim, "published, mean and range of 8 models", mean, min(low, high), max(low, high), None, None))
        said = {words: answer(claim, study, of) for words, (study, of) in studies.items()}
        for words, found in said.items():
            ends = sorted(sign * found.chosen[["low", "high"]])  # none where it was chosen
            noise = sign * found.chosen["noise"]
            rows.append((claim, f"same procedure: {words}", sign * found.chosen["value"], *ends, noise, None))
        for words, found in said.items():
            ends = sorted(sign * found.fixed_rule[["low", "high"]])
            rows.append((claim, f"fixed rule, test rows: {words}", sign * found.fixed_rule["value"], *ends, None, None))
        for words, found in said.items():
            turned = -1 if found.baseline["value"] < 0 else 1  # a baseline points anywhere
            row, name = found.baseline, LABELS[found.baseline_name]
            ends = sorted(turned * row[["low", "high"]])
            if not studies[words][1]:
                label = f"best simple baseline, its size: {words}"
                rows.append((claim, label, turned * row["value"], *ends, None, name))
    return pd.DataFrame(rows, columns=["claim", "label", "value", "low", "high", "noise", "note"])


# ------------------------------------------------------------------ cells of a table
def signed(value: float, digits: int = 2) -> str:
    """`+0.44`; nothing where there is no number."""
    return f"{value:+.{digits}f}" if pd.notna(value) else ""


def interval(value: float, low: float, high: float, digits: int = 2, tasks: float = FEW_TASKS) -> str:
    """`+0.44 [+0.10, +0.71]`; of fewer than eight tasks the value alone."""
    if tasks < FEW_TASKS:
        return signed(value, digits)
    shown = (f"{number:+.{digits}f}" for number in (value, low, high))
    return "{} [{}, {}]".format(*shown)


def with_interval(row: pd.Series, sign: int = 1) -> str:
    """The same of a row with these columns, turned by the sign."""
    low, high = sorted(sign * row[["low", "high"]])
    return interval(sign * row["value"], low, high, tasks=row.get("members", FEW_TASKS))


def number(column: str, digits: int) -> Cell:
    """A cell with a number; nothing where there is none."""
    return lambda row: f"{row[column]:.{digits}f}" if pd.notna(row.get(column)) else ""


def ends(column: str, low: str = "low", high: str = "high", digits: int = 2, scale: float = 1) -> Cell:
    """A cell with a signed number and its interval."""
    return lambda row: interval(scale * row[column], scale * row[low], scale * row[high], digits, row.get("tasks", 9))


def label(column: str) -> Cell:
    """A cell with the label of a score or measure."""
    return lambda row: LABELS.get(row[column], row[column])


def model_name(row: pd.Series) -> str:
    """`smollm2` in a fixed font."""
    return f"`{row['model']}`"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def measure_name(measure: str) -> str:
    """`lora_gain_paper` -> `LoRA gain, paper's probe`."""
    name = measure.replace("_", " ").replace("lora gain paper", "LoRA gain, paper's probe")
    return name.replace("lora", "LoRA").replace("mse", "MSE")


# ------------------------------------------------------------------ tables with columns of their own
def claims(data_dir: Path) -> list[str]:
    """The three claims: published, the same procedure here, the fixed rule, the best baseline; + is as claimed."""
    theirs, rows = published_range(), []
    for claim, (_, measure) in CLAIMS.items():
        sign, said = CLAIMED[measure], answer(claim, data_dir)
        chosen = (f"{signed(sign * row['value'])} ({signed(sign * row['noise'])}, p {row['p']:.2f})"
                  for row in (answer(claim, data_dir, "_paper").chosen, said.chosen))  # fmt: skip
        baseline = with_interval(said.baseline, 1 if said.baseline["value"] > 0 else -1)
        low, high = sorted(sign * theirs.loc[measure, ["min", "max"]])
        range_of_models = f"{signed(sign * theirs.loc[measure, 'mean'])} ({signed(low)} to {signed(high)})"
        rows.append((claim, range_of_models, *chosen, with_interval(said.fixed_rule, sign),
                     f"{LABELS[said.baseline_name]} {baseline}"))  # fmt: skip
    header = ("a higher NTPS goes with a", "published (range)", "same procedure, the paper's ten",
              "same procedure, all", "fixed rule, test rows", "best simple baseline, its size")  # fmt: skip
    return markdown(header, rows)


def like_for_like(data_dir: Path, of: str = "") -> list[str]:
    """Question 1: every step, mean over the models; of the paper's datasets alone with `_paper`."""
    table, theirs, rows = read_table(f"findings_like_for_like{of}", data_dir), published_range(), []
    published_as = dict(CLAIMS.values())
    for _, row in table[table["model"] == "mean"].iterrows():
        was = ""
        if row["step"] == STEPS[0] and row["measure"] in published_as:
            was = "{mean:+.2f} ({min:+.2f} to {max:+.2f})".format(**theirs.loc[published_as[row["measure"]]])
        is_chosen = pd.notna(row["noise"])
        noise = f"{signed(row['noise'])} (p {row['p']:.3f})" if is_chosen else ""
        given = interval(row["given_classes"], row["given_classes_low"], row["given_classes_high"])
        here = signed(row["spearman"]) if is_chosen else interval(row["spearman"], row["low"], row["high"])
        rows.append((measure_name(row["measure"]), row["step"], was, here, noise, given))
    header = ("measure", "step", "published (range)", "here", "the same in noise", "here, number of classes held fixed")
    return markdown(header, rows)


def correlations(data_dir: Path, of: str = "") -> list[str]:
    """Question 2: every score and baseline with every measure; of the paper's datasets alone with `_paper`."""
    table = spearmans(data_dir, of)
    measures = [name for name in MEASURES if name in table.index.get_level_values(0) and not name.endswith("_paper")]

    def cell(measure: str, name: str) -> str:
        of_itself = name in OF_THE_OUTCOME and measure not in GAINS
        return "" if of_itself or (measure, name) not in table.index else with_interval(table.loc[(measure, name)])

    rows = [(LABELS[name], *(cell(measure, name) for measure in measures)) for name in ASKED]
    return markdown(("", *(LABELS[name] for name in measures)), [row for row in rows if any(row[1:])])


def controls(data_dir: Path) -> list[str]:
    """Question 3: `retained` of V, of random V and of V by PCA, with the leads over random V."""
    table, rows = read_table("findings_controls", data_dir), []
    table = table[table["score"] == "retained"].set_index(["model", "v"])
    lead = ends("lead_over_random", digits=3)
    for model in dict.fromkeys(table.index.get_level_values(0)):
        own, random, pca = (table.loc[(model, v)] for v in ("autoregression", "random", "pca"))
        values = (f"{row['value']:.3f}" for row in (own, random, pca))
        z = (number(f"tasks_{side}_2_random_z", 0)(own) for side in ("above", "below_minus"))
        rows.append((f"`{model}`", f"{own['tasks']:.0f}", *values, lead(own), lead(pca), *z))
    header = ("model", "tasks", "V", "random V", "V by PCA", "V - random V", "V by PCA - random V", "tasks with z > 2",
              "z < -2")  # fmt: skip
    return markdown(header, rows)


def twin(data_dir: Path) -> list[str]:
    """The paper's procedure by the scores of a model, and by those of random weights."""
    table, rows = read_table("findings_twin", data_dir).set_index(["measure", "step", "weights"]), []
    for measure, step in dict.fromkeys(key[:2] for key in table.index):
        of_each = [table.loc[(measure, step, weights)] for weights in ("trained", "random")]
        noise = [f" ({signed(row['noise'])}, p {row['p']:.2f})" if pd.notna(row["noise"]) else "" for row in of_each]
        cells = [signed(row["spearman"]) + words for row, words in zip(of_each, noise, strict=True)]
        rows.append((measure_name(measure), step, *cells, f"{of_each[1]['tasks']:.0f}"))
    return markdown(("measure", "step", "its own scores", "those of random weights", "tasks"), rows)


def tasks(data_dir: Path) -> list[str]:
    """Every task of a study: test accuracy of each way of training, and the scores; means over seeds."""
    cells = trained_models(load_cells(data_dir)).sort_values("probe_accuracy", ascending=False)
    columns = {"majority_accuracy": "majority", "bag_of_words_accuracy": "", "probe_accuracy": "probe",
               "best_layer_accuracy": "", "lora_accuracy": "LoRA", "full_accuracy": "full fine-tuning",
               "ntps": "`ntps`", "retained": "", "retained_random": "", "retained_pca": ""}  # fmt: skip
    known = {name: short or LABELS[name] for name, short in columns.items() if name in cells and cells[name].any()}
    rows = [
        (f"`{row['dataset']}`", number("num_classes", 0)(row) or "target", *(number(name, 3)(row) for name in known))
        for _, row in cells.iterrows()
    ]
    return markdown(("dataset", "classes", *known.values()), rows)


# ------------------------------------------------------------------ tables of one CSV file, a row each
def read_gains(data_dir: Path) -> pd.DataFrame:
    """Question 5: the gain predicted for a task left out, and the decision."""
    errors, decisions = (read_table(f"findings_{name}", data_dir).query("measure == 'lora_gain'")
                         for name in ("calibration", "decision"))  # fmt: skip
    decisions = decisions.set_index("score")[["auc", "low", "high"]].add_prefix("decision_")
    asked = errors[errors["predictors"].isin(["nothing", *CANDIDATES])]
    return asked.join(decisions.rename(columns={"decision_auc": "auc"}), on="predictors")


def rows_where(name: str, /, **allowed: Iterable[str]) -> Callable[[Path], pd.DataFrame]:
    """The rows of a table of the findings whose columns have one of the values."""

    def read(data_dir: Path) -> pd.DataFrame:
        table = read_table(f"findings_{name}", data_dir)
        for column, values in allowed.items():
            table = table[table[column].isin(list(values))]
        return table

    return read


def by_accuracy(data_dir: Path) -> pd.DataFrame:
    """Question 8, the layer that is read best first."""
    return read_table("findings_layer_choice", data_dir).sort_values("accuracy", ascending=False, kind="stable")


def without_changes(row: pd.Series) -> str:
    """Label of a score, a measure, or the change of a score by LoRA."""
    name = row["name"].removesuffix("_change")
    return f"change by LoRA of {LABELS[name]}" if name != row["name"] else LABELS[name]


NAMED = [*LABELS, *(f"{name}_change" for name in LABELS)]
DECISION = "{auc:.2f} [{decision_low:.2f}, {decision_high:.2f}]"
# table -> its rows, and for each column the header and the cell
ROWS: dict[str, tuple[Callable[[Path], pd.DataFrame], dict[str, Cell]]] = {
    "leads": (
        rows_where("leads", score=("ntps", "retained", "ridge_r2", "logme"),
                   measure=("probe_accuracy", "probe_skill", "probe_mse", "lora_gain")),
        {"score": label("score"), "with": label("measure"),
         "best baseline": lambda row: LABELS.get(row["best_baseline"]) or f"`{row['score']}` of a random V",
         "lead, in the size of the correlation": ends("lead")},
    ),
    "random_weights": (
        rows_where("random_weights", name=NAMED),
        {"": without_changes, "trained": number("trained", 3), "random weights": number("random_weights", 3),
         "difference": ends("lead", digits=3),
         "Spearman of the two over tasks": ends("spearman", "spearman_low", "spearman_high"),
         "tasks": number("tasks", 0)},
    ),
    "after_lora": (
        rows_where("after_lora"),
        {"model": model_name, "score": label("score"), "before": number("before", 3),
         "change": ends("change", digits=3), "raised in": lambda row: f"{row['raised']} of {row['cells']}",
         "Spearman of the change with the gain": ends("spearman_with_gain", "spearman_low", "spearman_high")},
    ),
    "gains": (
        read_gains,
        {"from": lambda row: LABELS.get(row["predictors"], "the other tasks' mean"),
         "mean absolute error, points": number("error_points", 1),
         "lead over the mean gain": lambda row: "" if row["predictors"] == "nothing" else ends("lead", digits=1)(row),
         'AUC of "more than 2 points"': lambda row: DECISION.format(**row) if pd.notna(row["auc"]) else ""},
    ),
    "seeds": (
        rows_where("seeds", name=("ntps", "ntps_label", "retained", "retained_z", "retained_lead", "ridge_r2",
                                  "probe_accuracy", "lora_gain")),
        {"model": model_name, "score": label("name"), "between seeds": number("sd_between_seeds", 4),
         "over tasks": number("sd_over_tasks", 4),
         "share": lambda row: "{share:.2f} [{low:.2f}, {high:.2f}]".format(**row), "tasks": number("tasks", 0)},
    ),
    "layer_choice": (
        by_accuracy,
        {"layer": label("chosen_by"), "probe accuracy on test rows": number("accuracy", 3),
         "lead over the last layer, points":
             lambda row: "" if row["chosen_by"] == "last layer" else ends("lead", digits=1, scale=100)(row)},
    ),
    "shared_tasks": (
        rows_where("shared_tasks", name=LABELS),
        {"": label("name"), "SmolLM2 with a docstring LM": with_interval,
         "two docstring LMs": lambda row: signed(row["between_others"])},
    ),
}  # fmt: skip


def one_by_one(name: str, data_dir: Path) -> list[str]:
    """A table of `ROWS`."""
    read, cells = ROWS[name]
    return markdown(cells, ([cell(row) for cell in cells.values()] for _, row in read(data_dir).iterrows()))


PAGE_TABLES: dict[str, Callable[[Path], list[str]]] = {name: partial(one_by_one, name) for name in ROWS}
PAGE_TABLES |= {table.__name__: table for table in (claims, like_for_like, correlations, controls, twin, tasks)}
PAGE_TABLES |= {f"{table.__name__}_paper": partial(table, of="_paper") for table in (like_for_like, correlations)}


# ------------------------------------------------------------------ pages
def filled(text: str, page: Path) -> str:
    """The page with its tables as the CSV files have them.

    Raises:
        UserError: it asks for an unknown table or study.
    """

    def block(match: re.Match) -> str:
        start, name, study, end = match.groups()
        folder = DATA_DIR if study in (None, "docstrings") else DATA_DIR / study
        if name not in PAGE_TABLES or folder not in find_studies():
            raise UserError(f"{page} asks for the table {name!r} of {study!r}; there are {', '.join(PAGE_TABLES)}.")
        return start + "\n".join(PAGE_TABLES[name](folder)) + "\n" + end

    return BLOCK.sub(block, text)


def main(config: Config) -> None:
    """Rewrites the pages, or says which is stale."""
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = filled(before, page)
        if after != before and config.check:
            raise UserError(f"{page} is not what the CSV files say. Run: python -m fig_plot.findings.page")
        if after != before:
            with write_atomically(ROOT / page) as temporary:
                temporary.write_text(after, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
