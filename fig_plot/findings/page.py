"""Write the tables of README.md, docs/findings.md and docs/scores.md from the CSV files of fig_plot.findings.

    python -m fig_plot.findings.page            # rewrites the tables between <!-- table: ... --> and <!-- end -->
    python -m fig_plot.findings.page --check    # changes nothing; exit code 1 if a page differs from the CSV files

A `Table` is a frame with a cell format for each column. `<!-- table: tasks of smollm2 gemma3-270m -->` asks for the
rows of two studies, one below the other, and skips a study without such rows. People write the words around the
tables.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fig_plot.findings.procedure import STEPS
from fig_plot.findings.questions import GAINS, OF_THE_OUTCOME, known, rivals_of
from fig_plot.tables import (
    CLAIMED,
    DATA_DIR,
    FEATURE_SCORES,
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

PAGES = (Path("README.md"), Path("docs/findings.md"), Path("docs/scores.md"))
BLOCK = re.compile(r"(<!-- table: (\w+) of ([\w -]+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
# rows of question 2, from top to bottom
FEW_TASKS = 8  # with fewer tasks a bootstrap interval says nothing
UNASKED = (*MEASURES, "ntps_whitened", "majority_accuracy", "num_parameters", "lora_accuracy")
ASKED = [name for name in LABELS if name not in UNASKED]
# a claim -> the measure on training rows, the one on test rows
CLAIMS = {
    "more accurate probe": ("train_accuracy", "probe_accuracy"),
    "smaller error of the probe": ("train_mse", "probe_mse"),
    "smaller gain of LoRA": ("lora_gain_paper", "lora_gain"),
}
PUBLISHED = "{published_value:+.2f} ({published_low:+.2f} to {published_high:+.2f})"
# rows of question 7
MODEL_CHOOSERS = ("ntps", "ntps_label", "retained", *FEATURE_SCORES, "num_parameters", "better on the others")


@dataclass(frozen=True)
class Config:
    """The only setting: rewrite the pages, or check them."""

    check: bool = False  # write nothing; fail if a page would change


class Table(NamedTuple):
    """Rows, and for each column its header and the format of its cells."""

    rows: pd.DataFrame
    columns: dict[str, str]


def interval(value: str, ends: str = "", digits: int = 2) -> str:
    """The cell format of a value and its interval; the columns `<ends>low` and `<ends>high` hold the interval."""
    cells = [f"{{{name}:+.{digits}f}}" for name in (value, f"{ends}low", f"{ends}high")]
    return "{} [{}, {}]".format(*cells)


# ------------------------------------------------------------------ from CSV files to rows
def read_findings(name: str, data_dir: Path) -> pd.DataFrame:
    """Reads a table of the findings, without intervals over fewer than eight tasks."""
    table = read_table(f"findings_{name}", data_dir)
    num_tasks = table[known(table, ("members", "tasks", "datasets"))[0]]
    ends = [column for column in table if column.endswith(("low", "high"))]
    table.loc[num_tasks < FEW_TASKS, ends] = np.nan
    return table


def spearmans(data_dir: Path, of: str = "") -> pd.DataFrame:
    """Spearman across tasks under the fixed rule, a row per measure and score; `of="_paper"`: the paper's datasets."""
    table = read_findings(f"correlations{of}", data_dir)
    return table[table["direction"] == "across tasks"]


def published_range() -> pd.DataFrame:
    """Published correlations across tasks, by measure: mean, smallest and largest of the eight models."""
    table = pd.read_csv(DATA_DIR / "published_correlations.csv", comment="#")
    of_measure = table[table["direction"] == "across tasks"].groupby("measure")["spearman"]
    return of_measure.agg(value="mean", low="min", high="max")


def side_by_side(table: pd.DataFrame, rows: str | list[str], columns: str) -> pd.DataFrame:
    """A row per value of `rows`; the other cells in columns `<value of columns>_<name>`."""
    pivoted = table.pivot(index=rows, columns=columns)
    pivoted.columns = [f"{value}_{name}" for name, value in pivoted.columns]
    return pivoted.reset_index()


def overview_rows(tables_dir: Path = DATA_DIR) -> pd.DataFrame:
    """A row for each bar of the overview: claim, label, value, low, high, noise, p, note; positive is as claimed.

    A study has the bars of the claims that it measures. The baseline is the simple one with the largest correlation;
    its bar shows the size of that correlation.
    """
    steps, rules, rows = dict[str, pd.DataFrame](), dict[str, pd.DataFrame](), list[dict]()
    for study, title in reversed(find_studies(tables_dir).items()):
        for of, label in (("_paper", f"{title}, the paper's datasets"), ("", title)):
            if table_path(f"findings_like_for_like{of}", study).is_file():
                found = read_findings(f"like_for_like{of}", study).rename(columns={"spearman": "value"})
                steps[label] = found.set_index(["measure", "model", "step"])
                rules[label] = spearmans(study, of).set_index(["measure", "score"])

    def add(claim: str, label: str, row: pd.Series, sign: float, note: str | None = None) -> None:
        low, high = sorted(sign * row[["low", "high"]])
        rows.append({"claim": claim, "label": label, "value": sign * row["value"], "low": low, "high": high,
                     "noise": sign * row.get("noise", np.nan), "p": row.get("p", np.nan), "note": note})  # fmt: skip

    for claim, (chosen_on, measure) in CLAIMS.items():
        sign = CLAIMED[measure]
        add(claim, "published, mean and range of 8 models", published_range().loc[measure], sign)
        measured = [title for title in steps
                    if chosen_on in steps[title].index and (measure, "ntps") in rules[title].index]  # fmt: skip
        for title in measured:
            add(claim, f"same procedure: {title}", steps[title].loc[(chosen_on, "mean", STEPS[0])], sign)
        for title in measured:
            add(claim, f"fixed rule, test rows: {title}", rules[title].loc[(measure, "ntps")], sign)
        for title in measured:
            if not title.endswith("the paper's datasets"):
                rule = rules[title]
                rivals = rule.loc[measure].filter(rivals_of(measure), axis=0)
                best = rivals.loc[rivals["value"].abs().idxmax()]
                add(claim, f"best simple baseline, its size: {title}", best, np.sign(best["value"]), LABELS[best.name])
    return pd.DataFrame(rows)


# ------------------------------------------------------------------ the tables
def claims(data_dir: Path) -> Table:
    """The three claims: published, the same procedure here, the fixed rule, the best baseline; + is as claimed."""
    title, rows = find_studies(DATA_DIR)[data_dir], overview_rows()
    steps = {
        "published, mean and range of 8 models": "published",
        f"same procedure: {title}, the paper's datasets": "paper",
        f"same procedure: {title}": "all",
        f"fixed rule, test rows: {title}": "fixed",
        f"best simple baseline, its size: {title}": "baseline",
    }
    rows = side_by_side(rows.assign(label=rows["label"].map(steps)).dropna(subset="label"), "claim", "label")
    chosen = "{%s_value:+.2f} ({%s_noise:+.2f}, p {%s_p:.2f})"
    return Table(
        rows.set_index("claim", drop=False).loc[list(CLAIMS)],
        {"a higher NTPS goes with a": "{claim}", "published (range)": PUBLISHED,
         "same procedure, the paper's datasets": chosen.replace("%s", "paper"),
         "same procedure, all": chosen.replace("%s", "all"),
         "fixed rule, test rows": interval("fixed_value", "fixed_"),
         "best simple baseline, its size": "{baseline_note} " + interval("baseline_value", "baseline_")},
    )  # fmt: skip


def tasks(data_dir: Path) -> Table:
    """Every task of a study: test accuracy of each way of training, and the scores; means over seeds."""
    cells = trained_models(load_cells(data_dir)).sort_values("probe_accuracy", ascending=False)
    cells["classes"] = cells["num_classes"].map("{:.0f}".format, na_action="ignore").fillna("target")
    names = ("majority_accuracy", "bag_of_words_accuracy", "probe_accuracy", "best_layer_accuracy", "lora_accuracy",
             "full_accuracy", "ntps", "retained", "retained_random", "retained_pca")  # fmt: skip
    numbers = {LABELS[name]: f"{{{name}:.3f}}" for name in known(cells, names)}
    return Table(cells, {"dataset": "`{dataset}`", "classes": "{classes}", **numbers})


def like_for_like_paper(data_dir: Path) -> Table:
    """Question 1 on the paper's datasets: every step, mean over the models."""
    rows = read_findings("like_for_like_paper", data_dir).query("model == 'mean'").drop(columns="model")
    on_train = {measure: chosen_on for chosen_on, measure in CLAIMS.values()}
    published = published_range().add_prefix("published_").rename(index=on_train)
    rows = rows.join(published.assign(step=STEPS[0]).set_index("step", append=True), on=["measure", "step"])
    names = {"lora_gain": "LoRA gain", "lora_gain_paper": "LoRA gain, paper's probe", "train_mse": "train MSE"}
    return Table(
        rows.assign(measure=rows["measure"].map(lambda name: names.get(name, name.replace("_", " ")))),
        {"measure": "{measure}", "step": "{step}", "published (range)": PUBLISHED, "here": interval("spearman"),
         "the same in noise": "{noise:+.2f} (p {p:.3f})",
         "here, number of classes held fixed": interval("given_classes", "given_classes_")},
    )  # fmt: skip


def correlations(data_dir: Path) -> Table:
    """Question 2: every score and baseline with every measure."""
    table = spearmans(data_dir)
    is_shown = ~table["score"].isin(OF_THE_OUTCOME) | table["measure"].isin(GAINS)
    table = table[is_shown & (table["measure"] != "lora_gain_paper") & table["score"].isin(ASKED)]
    rows = side_by_side(table[["score", "measure", "value", "low", "high"]], "score", "measure")
    rows = rows.sort_values("score", key=lambda names: names.map(ASKED.index))
    measures = [name for name in MEASURES if name in set(table["measure"])]
    return Table(
        rows.assign(score=rows["score"].map(LABELS)),
        {"": "{score}"} | {LABELS[name]: interval(f"{name}_value", f"{name}_") for name in measures},
    )


def controls(data_dir: Path) -> Table:
    """Questions 3 and 9: `retained` of V, of random V and of V by PCA, with the leads over random V."""
    table = read_findings("controls", data_dir).query("score == 'retained'").drop(columns="score")
    middle = read_findings("special", DATA_DIR).query("statistic == 'mean lead' and place == 'middle'")
    at_middle = middle.set_index("models")[["value", "low", "high"]].add_prefix("middle_")
    return Table(
        side_by_side(table, "model", "v").join(at_middle, on="model"),
        {"model": "`{model}`", "tasks": "{autoregression_tasks:.0f}", "V": "{autoregression_value:.3f}",
         "random V": "{random_value:.3f}", "V by PCA": "{pca_value:.3f}",
         "V - random V": interval("autoregression_lead_over_random", "autoregression_", 3),
         "V by PCA - random V": interval("pca_lead_over_random", "pca_", 3),
         "tasks with z > 2": "{autoregression_tasks_above_2_random_z:.0f}",
         "z < -2": "{autoregression_tasks_below_minus_2_random_z:.0f}",
         "V - random V, middle layer": interval("middle_value", "middle_", 3)},
    )  # fmt: skip


def after_lora(data_dir: Path) -> Table:
    """Question 4: the change of each score by LoRA, and whether it follows the gain."""
    rows = read_findings("after_lora", data_dir)
    return Table(
        rows.assign(score=rows["score"].map(LABELS)),
        {"model": "`{model}`", "score": "{score}", "before": "{before:.3f}", "change": interval("change", digits=3),
         "raised in": "{raised} of {cells}",
         "Spearman of the change with the gain": interval("spearman_with_gain", "spearman_")},
    )  # fmt: skip


def which_model(data_dir: Path) -> Table:
    """Question 7: the pairs of real LLMs, and all pairs; share of datasets in order, lead over the better baseline."""
    table = read_findings("which_model", data_dir)
    studies = [study for study in find_studies(DATA_DIR) if study != data_dir]
    real = {model for study in studies for model in read_table("models", study)["model"]}
    is_shown = table["models"].map(lambda pair: pair == "all" or set(pair.split(", ")) <= real)
    table = table[is_shown & table["score"].isin(MODEL_CHOOSERS)]
    outcomes = {"best_test_accuracy": "best layer", "lora_accuracy": "LoRA"}
    named = table["score"].map(lambda name: LABELS.get(name, name))
    return Table(
        table.assign(outcome=table["outcome"].map(outcomes), score=named),
        {"models": "{models}", "test accuracy": "{outcome}", "score": "{score}",
         "share in order": "{share:.2f} [{low:.2f}, {high:.2f}]",
         "lead over the better baseline": interval("lead", "lead_")},
    )  # fmt: skip


def layer_choice(data_dir: Path) -> Table:
    """Question 8, the layer with the most accurate probe first."""
    rows = read_findings("layer_choice", data_dir).sort_values("accuracy", ascending=False, kind="stable")
    leads = {"lead": "last layer", "over_middle": "middle layer", "over_others": "best on the others"}
    rows[[name for name in rows if name.startswith((*leads, "low", "high"))]] *= 100  # points
    for name, itself in leads.items():
        rows[name] = rows[name].where(rows["chosen_by"] != itself)
    return Table(
        rows.assign(chosen_by=rows["chosen_by"].map(lambda name: LABELS.get(name, name))),
        {"layer": "{chosen_by}", "probe accuracy on test rows": "{accuracy:.3f}",
         "lead over the last layer, points": interval("lead", digits=1),
         "over the middle layer": interval("over_middle", "over_middle_", 1),
         "over the layer best elsewhere": interval("over_others", "over_others_", 1)},
    )  # fmt: skip


def coordinates(data_dir: Path) -> Table:
    """Question 10: the scores that depend on the scale of the coordinates, in every scaling."""
    table = read_findings("coordinates", data_dir).query("score in ('ntps', 'ntps_label')")
    return Table(
        table.assign(coordinates=table["coordinates"].str.replace("_", " ")),
        {"model": "`{model}`", "layer": "{layer}", "score": "`{score}`", "coordinates": "{coordinates}",
         "mean": "{mean:.3f}", "sd over datasets": "{sd_over_datasets:.3f}",
         "sd over scalings": "{sd_over_scalings:.3f}",
         "Spearman with accuracy": interval("probe_accuracy", "probe_accuracy_"),
         "with MSE / variance": interval("probe_mse", "probe_mse_")},
    )  # fmt: skip


def first_choice(data_dir: Path) -> Table:
    """The choices of prescreen.py on every dataset, beside the best one."""
    return Table(
        read_table("findings_first_choice", data_dir),
        {"dataset": "`{dataset}`", "chosen model, layer": "`{model}`, {layer}", "its probe": "{test_accuracy:.3f}",
         "best model, layer": "`{best_model}`, {best_layer}", "points lost": "{points_lost:.1f}",
         "bag of words": "{bag_of_words:.3f}", "recommended": "{recommended}"},
    )  # fmt: skip


TABLES: dict[str, Callable[[Path], Table]] = {
    table.__name__: table
    for table in (claims, tasks, like_for_like_paper, correlations, controls, after_lora, which_model, layer_choice,
                  coordinates, first_choice)
}  # fmt: skip


# ------------------------------------------------------------------ pages
def fill(form: str, row: dict) -> str:
    """Fills a cell's format with the row's values; leaves out an incomplete interval; empty without a value."""
    for part in (form, form.split(" [")[0]):
        if all(pd.notna(row.get(name)) for name in re.findall(r"{(\w+)", part)):
            return part.format(**row)
    return ""


def markdown(tables: dict[str, Table]) -> str:
    """A Markdown table of several studies, by title; the title becomes a column if no other tells rows apart."""
    if not tables:
        return "No study has these rows yet."
    columns = {header: form for table in tables.values() for header, form in table.columns.items()}
    if len(tables) > 1 and "model" not in columns:
        columns = {"study": "{study}", **columns}
    lines = [list(columns), ["---"] * len(columns)]
    for title, table in tables.items():
        for row in table.rows.assign(study=title).to_dict("records"):
            lines.append([fill(form, {str(name): value for name, value in row.items()}) for form in columns.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_page(text: str, page: Path) -> str:
    """The page with its tables made again from the CSV files; raises UserError if it asks for an unknown table."""

    def block(match: re.Match) -> str:
        start, name, studies, end = match.groups()
        if name not in TABLES:
            raise UserError(f"{page} asks for the table {name!r}, but the tables are {', '.join(TABLES)}.")
        titles, source = find_studies(DATA_DIR), {"claims": "like_for_like", "tasks": "correlations"}.get(name, name)
        folders = [DATA_DIR if study == "docstrings" else DATA_DIR / study for study in studies.split()]
        found = [folder for folder in folders if table_path(f"findings_{source}", folder).is_file()]
        return f"{start}{markdown({titles[folder]: TABLES[name](folder) for folder in found})}\n{end}"

    return BLOCK.sub(block, text)


def main(config: Config) -> None:
    """Rewrites the pages, or with --check names the stale ones."""
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = fill_page(before, page)
        if after != before and config.check:
            raise UserError(f"{page} differs from the CSV files. Run: python -m fig_plot.findings.page")
        if after != before:
            with write_atomically(ROOT / page) as temporary:
                temporary.write_text(after, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
