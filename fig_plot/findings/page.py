"""The tables of docs/findings.md and of the README's first screen, written from the CSV files of findings.py.

    python -m fig_plot.page            # rewrites what stands between <!-- table: ... --> and <!-- end -->
    python -m fig_plot.page --check    # changes nothing; exit code 1 where a page is not what the CSV files say

The words around the tables are written by hand, and hold no number that does not stand in one of them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from fig_plot.findings.fixed_rule import GAINS, OF_THE_OUTCOME
from fig_plot.findings.gains import CANDIDATES
from fig_plot.findings.like_for_like import STEPS
from fig_plot.findings.overview import CLAIMS, answer, published, spearmans
from fig_plot.tables import ALL_STUDIES, CLAIMED, HELD_OUT, MEASURES, load_cells, read_table, study_dir, trained_models
from utils.results import write_atomically
from utils.script import ROOT, UserError, run_script

PAGES = (Path("README.md"), Path("docs/findings.md"))
BLOCK = re.compile(r"(<!-- table: (\w+)(?: of ([\w-]+))? -->\n).*?(<!-- end -->)", flags=re.DOTALL)
ASKED = {  # of question 2, from top to bottom
    "ntps": "`ntps`, the paper's score",
    "ntps_smallest": "... smallest eigenvalues, as released",
    "ntps_label": "`ntps_label`",
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
    "bag_of_words_accuracy": "bag of words",
    "headroom": "1 - probe accuracy",
    "best_layer_accuracy": "probe of the best layer",
    "mean of the others": "mean of the other models",
}
NAMES = ASKED | {
    "best_layer_lead": "R2 of the best layer - that of the last",
    "ntps_whitened": "`ntps_whitened`",
    HELD_OUT: "R2 of a linear probe on held-out rows",
}

FEW_TASKS = 8  # of which a bootstrap says nothing
LABELS = MEASURES | NAMES | {"lora_accuracy": "LoRA accuracy"}  # of scores and of what they should predict
LABELS |= {f"{name}_change": f"change by LoRA of {label}" for name, label in NAMES.items()}


@dataclass(frozen=True)
class Config:
    """Nothing to edit."""

    check: bool = False  # write nothing, and fail where something would be written


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


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def measure_name(measure: str) -> str:
    """`lora_gain_paper` -> `LoRA gain, paper's probe`."""
    name = measure.replace("_", " ").replace("lora gain paper", "LoRA gain, paper's probe")
    return name.replace("lora", "LoRA").replace("mse", "MSE")


# ------------------------------------------------------------------ tables
def claims(data_dir: Path) -> list[str]:
    """The three claims: published, the same procedure here, the fixed rule, the best baseline; + is as claimed."""
    theirs, rows = published(), []
    for claim, (_, measure) in CLAIMS.items():
        sign, of_paper, said = CLAIMED[measure], answer(claim, data_dir, "_paper"), answer(claim, data_dir)
        chosen = (
            f"{signed(sign * row['value'])} ({signed(sign * row['noise'])}, p {row['p']:.2f})"
            for row in (of_paper.chosen, said.chosen)
        )
        baseline = with_interval(said.baseline, 1 if said.baseline["value"] > 0 else -1)
        low, high = sorted(sign * theirs.loc[measure, ["min", "max"]])
        range_of_models = f"{signed(sign * theirs.loc[measure, 'mean'])} ({signed(low)} to {signed(high)})"
        rows.append((claim, range_of_models, *chosen, with_interval(said.fixed_rule, sign),
                     f"{NAMES[said.baseline_name]} {baseline}"))  # fmt: skip
    header = ("a higher NTPS goes with a", "published (range)", "same procedure, the paper's ten",
              "same procedure, all", "fixed rule, test rows", "best simple baseline, its size")  # fmt: skip
    return markdown(header, rows)


def like_for_like(data_dir: Path, of: str = "") -> list[str]:
    """Question 1: every step, mean over the models; of the paper's datasets alone with `_paper`."""
    table, theirs, rows = read_table(f"findings_like_for_like{of}", data_dir), published(), []
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

    rows = [(label, *(cell(measure, name) for measure in measures)) for name, label in ASKED.items()]
    rows = [row for row in rows if any(row[1:])]
    return markdown(("", *(MEASURES[name] for name in measures)), rows)


def leads(data_dir: Path) -> list[str]:
    """Question 2: size of the correlation less that of the best baseline."""
    table, rows = read_table("findings_leads", data_dir), []
    for _, row in table[table["score"].isin(("ntps", "retained", "ridge_r2", "logme"))].iterrows():
        if row["measure"] in ("probe_accuracy", "probe_skill", "probe_mse", "lora_gain"):
            best = NAMES.get(row["best_baseline"], f"`{row['best_baseline'].removesuffix('_random')}` of a random V")
            lead = interval(row["lead"], row["low"], row["high"])
            rows.append((NAMES[row["score"]], MEASURES[row["measure"]], best, lead))
    return markdown(("score", "with", "best baseline", "lead, in the size of the correlation"), rows)


def controls(data_dir: Path) -> list[str]:
    """Question 3: `retained` of V, of random V and of V by PCA, with the leads over random V."""
    table, rows = read_table("findings_controls", data_dir), []
    table = table[table["score"] == "retained"].set_index(["model", "v"])
    for model in dict.fromkeys(table.index.get_level_values(0)):
        own, pca = table.loc[(model, "autoregression")], table.loc[(model, "pca")]
        leads = (interval(row["lead_over_random"], row["low"], row["high"], digits=3) for row in (own, pca))
        counts = [own.get(f"tasks_{side}_2_random_z") for side in ("above", "below_minus")]
        z = [f"{count:.0f}" if pd.notna(count) else "" for count in counts]
        values = [f"{row['value']:.3f}" for row in (own, table.loc[(model, "random")], pca)]
        rows.append((f"`{model}`", f"{own['tasks']:.0f}", *values, *leads, *z))
    header = ("model", "tasks", "V", "random V", "V by PCA", "V - random V", "V by PCA - random V", "tasks with z > 2",
              "z < -2")  # fmt: skip
    return markdown(header, rows)


def random_weights(data_dir: Path) -> list[str]:
    """A trained model beside its twin of random weights."""
    table, rows = read_table("findings_random_weights", data_dir), []
    for _, row in table[table["name"].isin(LABELS)].iterrows():
        lead = interval(row["lead"], row["low"], row["high"], digits=3, tasks=row["tasks"])
        order = interval(row["spearman"], row["spearman_low"], row["spearman_high"], tasks=row["tasks"])
        name = LABELS[row["name"]]
        rows.append((name, f"{row['trained']:.3f}", f"{row['random_weights']:.3f}", lead, order, f"{row['tasks']:.0f}"))
    header = ("", "trained", "random weights", "difference", "Spearman of the two over tasks", "tasks")
    return markdown(header, rows)


def twin(data_dir: Path) -> list[str]:
    """The paper's procedure by the scores of a model, and by those of random weights."""
    table, rows = read_table("findings_twin", data_dir).set_index(["measure", "step", "weights"]), []
    for measure, step in dict.fromkeys(key[:2] for key in table.index):
        cells = []
        for weights in ("trained", "random"):
            row = table.loc[(measure, step, weights)]
            noise = f" ({signed(row['noise'])}, p {row['p']:.2f})" if pd.notna(row["noise"]) else ""
            cells.append(f"{signed(row['spearman'])}{noise}")
        rows.append((measure_name(measure), step, *cells, f"{row['tasks']:.0f}"))
    return markdown(("measure", "step", "its own scores", "those of random weights", "tasks"), rows)


def after_lora(data_dir: Path) -> list[str]:
    """Question 4: each score before and after."""
    table, rows = read_table("findings_after_lora", data_dir), []
    for _, row in table.iterrows():
        change = interval(row["change"], row["low"], row["high"], digits=3)
        follows = interval(row["spearman_with_gain"], row["spearman_low"], row["spearman_high"])
        runs = f"{row['raised']} of {row['cells']}"
        rows.append((f"`{row['model']}`", NAMES[row["score"]], f"{row['before']:.3f}", change, runs, follows))
    return markdown(("model", "score", "before", "change", "raised in", "Spearman of the change with the gain"), rows)


def gains(data_dir: Path) -> list[str]:
    """Question 5: the gain predicted for a task left out, and the decision."""
    errors = read_table("findings_calibration", data_dir).query("measure == 'lora_gain'").set_index("predictors")
    decisions = read_table("findings_decision", data_dir).query("measure == 'lora_gain'").set_index("score")
    rows = []
    for name, row in errors.iterrows():
        if name == "nothing":
            rows.append(("the other tasks' mean", f"{row['error_points']:.1f}", "", ""))
        elif name in CANDIDATES:
            lead = interval(row["lead"], row["low"], row["high"], digits=1)
            decision = ""  # all tasks on one side of two points
            if name in decisions.index:
                decision = "{auc:.2f} [{low:.2f}, {high:.2f}]".format(**decisions.loc[name])
            rows.append((NAMES[name], f"{row['error_points']:.1f}", lead, decision))
    header = ("from", "mean absolute error, points", "lead over the mean gain", 'AUC of "more than 2 points"')
    return markdown(header, rows)


def seeds(data_dir: Path) -> list[str]:
    """Question 6: spread between seeds over spread over tasks."""
    table, rows = read_table("findings_seeds", data_dir), []
    named = ("ntps", "ntps_label", "retained", "retained_z", "retained_lead", "ridge_r2", "probe_accuracy", "lora_gain")
    for _, row in table[table["name"].isin(named)].iterrows():
        spreads = (f"{row['sd_between_seeds']:.4f}", f"{row['sd_over_tasks']:.4f}")
        share = "{share:.2f} [{low:.2f}, {high:.2f}]".format(**row)
        rows.append((f"`{row['model']}`", LABELS[row["name"]], *spreads, share, f"{row['tasks']:.0f}"))
    return markdown(("model", "score", "between seeds", "over tasks", "share", "tasks"), rows)


def layer_choice(data_dir: Path) -> list[str]:
    """Test accuracy of the probe of the layer that each score chooses."""
    table, rows = read_table("findings_layer_choice", data_dir), []
    for _, row in table.sort_values("accuracy", ascending=False, kind="stable").iterrows():
        is_last = row["chosen_by"] == "last layer"
        lead = "" if is_last else interval(100 * row["lead"], 100 * row["low"], 100 * row["high"], digits=1)
        rows.append((NAMES.get(row["chosen_by"], row["chosen_by"]), f"{row['accuracy']:.3f}", lead))
    return markdown(("layer", "probe accuracy on test rows", "lead over the last layer, points"), rows)


def shared_tasks(data_dir: Path) -> list[str]:
    """Each score and measure of the study beside that of the docstring LMs, over the tasks of both."""
    table, rows = read_table("findings_shared_tasks", data_dir), []
    for _, row in table[table["name"].isin(LABELS)].iterrows():
        rows.append((LABELS[row["name"]], with_interval(row), signed(row["between_others"])))
    return markdown(("", "SmolLM2 with a docstring LM", "two docstring LMs"), rows)


def tasks(data_dir: Path) -> list[str]:
    """Every task of a study: what each way reaches on test rows, and the scores; means over seeds."""
    cells, rows = trained_models(load_cells(data_dir)), []
    columns = ("majority_accuracy", "bag_of_words_accuracy", "probe_accuracy", "best_layer_accuracy", "lora_accuracy",
               "full_accuracy", "ntps", "retained", "retained_random", "retained_pca")  # fmt: skip
    known = [name for name in columns if name in cells and cells[name].notna().any()]
    for _, row in cells.sort_values("probe_accuracy", ascending=False).iterrows():
        shown = (f"{row[name]:.3f}" if pd.notna(row[name]) else "" for name in known)
        rows.append(
            (f"`{row['dataset']}`", f"{row['num_classes']:.0f}" if pd.notna(row["num_classes"]) else "target", *shown)
        )
    words = {"full_accuracy": "full fine-tuning", "majority_accuracy": "majority", "probe_accuracy": "probe",
             "lora_accuracy": "LoRA", "ntps": "`ntps`"}  # fmt: skip
    return markdown(("dataset", "classes", *({**NAMES, **words}[name] for name in known)), rows)


TABLES: dict[str, Callable[[Path], list[str]]] = {
    table.__name__: table
    for table in (
        claims,
        like_for_like,
        correlations,
        leads,
        controls,
        random_weights,
        twin,
        after_lora,
        gains,
        seeds,
        layer_choice,
        shared_tasks,
        tasks,
    )
}
TABLES |= {f"{table.__name__}_paper": partial(table, of="_paper") for table in (like_for_like, correlations)}


# ------------------------------------------------------------------ pages
def filled(text: str, page: Path) -> str:
    """The page with its tables as the CSV files have them.

    Raises:
        UserError: a table that is not known here, or of no study.
    """

    def block(match: re.Match) -> str:
        start, name, study, end = match.groups()
        study = "" if study in (None, "docstrings") else study
        if name not in TABLES or study not in ALL_STUDIES:
            raise UserError(f"{page} asks for the table {name!r} of {study!r}; there are {', '.join(TABLES)}.")
        return start + "\n".join(TABLES[name](study_dir(study))) + "\n" + end

    return BLOCK.sub(block, text)


def main(config: Config) -> None:
    """Rewrites the pages, or says which is stale."""
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = filled(before, page)
        if after != before and config.check:
            raise UserError(f"{page} is not what the CSV files say. Run: python -m fig_plot.page")
        if after != before:
            with write_atomically(ROOT / page) as temporary:
                temporary.write_text(after, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
