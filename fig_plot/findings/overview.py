"""The paper's three claims at a glance: published, the same procedure here, a fixed rule, the best simple baseline."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fig_plot.findings.fixed_rule import OF_THE_OUTCOME, RIVALS
from fig_plot.findings.like_for_like import STEPS
from fig_plot.tables import CLAIMED, DATA_DIR, STUDIES, present_studies, read_table, study_dir

# a claim -> the measure on training rows, the one on test rows
CLAIMS = {
    "more accurate probe": ("train_accuracy", "probe_accuracy"),
    "smaller error of the probe": ("train_mse", "probe_mse"),
    "smaller gain of LoRA": ("lora_gain_paper", "lora_gain"),
}


LABELS = {
    "chosen": "same procedure",
    "fixed_rule": "fixed rule, test rows",
    "baseline": "best simple baseline, its size",
}


class Claim(NamedTuple):
    """What a study says to one claim; each row with value, low and high."""

    chosen: pd.Series  # layer and K chosen on training rows, mean over models; also noise and p
    fixed_rule: pd.Series  # last layer, mean over K, test rows
    baseline: pd.Series
    baseline_name: str


def spearmans(data_dir: Path, of: str = "") -> pd.DataFrame:
    """Spearman across tasks under the fixed rule, by measure and score; of the paper's datasets alone with `_paper`."""
    table = read_table(f"findings_correlations{of}", data_dir)
    table = table[(table["correlation"] == "spearman") & (table["direction"] == "across tasks")]
    return table.set_index(["measure", "score"])


def published() -> pd.DataFrame:
    """Published correlations across tasks, by measure: mean, min and max over the eight models."""
    table = pd.read_csv(DATA_DIR / "published_correlations.csv", comment="#")
    rows = table[table["direction"] == "across tasks"]
    return rows.groupby("measure")["spearman"].agg(["mean", "min", "max"])


def answer(claim: str, data_dir: Path, of: str = "") -> Claim:
    """What a study says to a claim of `CLAIMS`; on the paper's datasets alone with `_paper`."""
    chosen_on, measure = CLAIMS[claim]
    steps = read_table(f"findings_like_for_like{of}", data_dir).set_index(["measure", "model", "step"])
    table = spearmans(data_dir, of).loc[measure]
    rivals = [name for name in RIVALS if name in table.index and ("gain" in measure or name not in OF_THE_OUTCOME)]
    best = str(table.loc[rivals, "value"].abs().idxmax())
    chosen = steps.loc[(chosen_on, "mean", STEPS[0])].rename({"spearman": "value"})
    return Claim(chosen, table.loc["ntps"], table.loc[best], best)


def overview_rows(names: dict[str, str]) -> pd.DataFrame:
    """A row for each bar of the overview: claim, label, value, low, high, noise; positive is the claimed direction.

    Args:
        names: of the baselines.
    """
    rows: list[tuple] = []
    theirs = published()
    for claim, (_, measure) in CLAIMS.items():
        sign = CLAIMED[measure]
        mean, low, high = theirs.loc[measure] * sign
        rows.append((claim, "published, mean and range of 8 models", mean, min(low, high), max(low, high), None, None))
        found = {}
        for study in reversed(present_studies()):
            if (study_dir(study) / "findings_like_for_like_paper.csv").is_file():
                found[f"{STUDIES[study]}, the paper's datasets"] = answer(claim, study_dir(study), "_paper")
            found[STUDIES[study]] = answer(claim, study_dir(study))
        for step, (title, said) in itertools.product(LABELS, found.items()):
            if step != "baseline" or title in STUDIES.values():
                row = getattr(said, step)
                noise = sign * row["noise"] if step == "chosen" else None
                turned = sign if step != "baseline" else (-1 if row["value"] < 0 else 1)  # a baseline points anywhere
                ends = sorted(turned * row[["low", "high"]])  # none where it was chosen
                note = names[said.baseline_name] if step == "baseline" else None
                rows.append((claim, f"{LABELS[step]}: {title}", turned * row["value"], *ends, noise, note))
    return pd.DataFrame(rows, columns=["claim", "label", "value", "low", "high", "noise", "note"])
