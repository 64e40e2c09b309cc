"""Test prescreen.py's rule: the model and layer that it chooses on each dataset, and the points that it loses.

    python -m fig_plot.findings.first_choice           # the committed studies; also fills the table of docs/scores.md

The rule chooses the largest ridge R2. The studies cross-validated R2 at the last layer but took it from test rows at
earlier layers, which gives other values; so R2 of last layers chooses the model, and R2 of earlier layers the layer. A
study with R2 at the last layer alone (closed_form.csv) leaves no choice of a layer. Points lost are test accuracy of
the most accurate probe of any model and layer, which nobody knows beforehand, minus that of the chosen probe. Models
with random weights are left out.

Reads probes.csv, datasets.csv and features.csv or closed_form.csv of every study. Writes
fig_plot/data/findings_first_choice.csv.
"""

import re
from dataclasses import dataclass

import pandas as pd

from fig_plot.tables import DATA_DIR, find_studies, read_table, save_csv, table_path, without_random_weights
from utils.script import ROOT, run_script

KEYS = ["model", "dataset", "layer"]
PAGE = ROOT / "docs" / "scores.md"
BLOCK = re.compile(r"(?<=<!-- first choice -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


@dataclass(frozen=True)
class Config:
    """No settings."""


def first_choices(probes: pd.DataFrame, ridge: pd.DataFrame, words: pd.Series) -> pd.DataFrame:
    """A row per dataset: the choice, its probe's test accuracy, the best one, points lost and the bag of words.

    Args:
        probes: `test_accuracy` of each model, dataset, seed and layer.
        ridge: `ridge_r2`, likewise; seeds are averaged before the choice.
        words: test accuracy of the bag of words by dataset.
    """
    accuracy = without_random_weights(probes).dropna(subset="test_accuracy").groupby(KEYS)["test_accuracy"].mean()
    r2 = ridge.dropna(subset="ridge_r2").groupby(KEYS)["ridge_r2"].mean()
    judged = pd.concat([accuracy, r2], axis=1, join="inner").reset_index()
    is_last = judged["layer"] == judged.groupby(["model", "dataset"])["layer"].transform("max")
    last = judged[is_last]
    models = last.loc[last.groupby("dataset")["ridge_r2"].idxmax(), ["model", "dataset"]]
    of_model = judged.assign(is_last=is_last).merge(models)
    candidates = of_model.sort_values(["is_last", "ridge_r2"], ascending=[True, False], kind="stable")
    chosen = candidates.groupby("dataset").first().drop(columns="is_last")
    probed = accuracy.reset_index()
    best = probed.loc[probed.groupby("dataset")["test_accuracy"].idxmax()].set_index("dataset").add_prefix("best_")
    table = chosen.join(best).assign(bag_of_words=words)
    table["points_lost"] = 100 * (table["best_test_accuracy"] - table["test_accuracy"])
    table["over_words"] = 100 * (table["test_accuracy"] - table["bag_of_words"])
    return table.reset_index()


def markdown(table: pd.DataFrame) -> str:
    """The table of docs/scores.md."""
    lines = ["| dataset | first choice, layer | its probe | best model, layer | points lost | bag of words |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in table.itertuples():
        choice, best = f"`{row.model}`, {row.layer}", f"`{row.best_model}`, {row.best_layer}"
        numbers = f"{row.test_accuracy:.3f} | {best} | {row.points_lost:.1f} | {row.bag_of_words:.3f}"
        lines.append(f"| `{row.dataset}` | {choice} | {numbers} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Writes the CSV file and the table of the page."""
    ridge, probes, words = [], [], []
    for study in find_studies():
        ridge.append(read_table("features" if table_path("features", study).is_file() else "closed_form", study))
        probes.append(read_table("probes", study))
        words.append(read_table("datasets", study))
    mean_of_words = pd.concat(words).groupby("dataset")["bag_of_words_accuracy"].mean()
    table = first_choices(pd.concat(probes), pd.concat(ridge), mean_of_words)
    save_csv(DATA_DIR / "findings_first_choice.csv", table)
    PAGE.write_text(BLOCK.sub(markdown(table), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(DATA_DIR / "findings_first_choice.csv")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
