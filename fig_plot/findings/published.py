"""The questions of docs/findings.md asked of the published numbers, which import_published.py reads."""

from pathlib import Path

import pandas as pd

from fig_plot.collect import parse_size
from fig_plot.findings.correlations import Draws
from fig_plot.findings.procedure import published_steps
from fig_plot.findings.questions import decision_rows, direction_rows, others_rows, partial_rows
from fig_plot.findings.selection import expected_maximum
from fig_plot.tables import matrix
from utils.models.table import MODELS
from utils.script import UserError


def read_published(data_dir: Path) -> dict[str, pd.DataFrame]:
    """measure -> model, dataset, ntps and the measure; the gain's also `headroom`.

    Raises:
        UserError: the values have not been imported.
    """
    if not (data_dir / "fig3.csv").is_file():
        raise UserError(f"No {data_dir / 'fig3.csv'}. Run: python -m fig_plot.import_published PATH")
    fig2, fig3 = pd.read_csv(data_dir / "fig2.csv"), pd.read_csv(data_dir / "fig3.csv")
    fig3 = fig3.assign(lora_gain=fig3["lora_accuracy"] - fig3["linear_accuracy"], headroom=1 - fig3["linear_accuracy"])
    train = fig2[fig2["metric"] == "train_accuracy"].rename(columns={"value": "probe_accuracy"})
    error = fig2[fig2["metric"] != "train_accuracy"].rename(columns={"value": "probe_mse"})
    return {"probe_accuracy": train, "probe_mse": error, "lora_gain": fig3}


def published_tables(data_dir: Path, draws: Draws) -> dict[str, pd.DataFrame]:
    """The same questions asked of the published values; maps over layers and K were not published.

    Raises:
        UserError: the values have not been imported.
    """
    published = read_published(data_dir)
    fig3, rows = published["lora_gain"], list[dict]()
    for without in (None, "medical"):  # its texts are a defect of the released loader
        for measure, cells in published.items():
            kept = cells[cells["dataset"] != without]
            target, score = matrix(kept, measure), matrix(kept, "ntps")
            sizes = pd.Series({model: parse_size(MODELS[model].parameters) for model in target.index})
            scores = {"ntps": score, "num_parameters": pd.DataFrame(dict.fromkeys(target, sizes))}
            if "headroom" in kept:
                scores["headroom"] = matrix(kept, "headroom")
            found = [*others_rows(measure, target, draws)]
            for name, table in scores.items():
                found += direction_rows("tasks", name, measure, table, target, draws)
                found += direction_rows("models", name, measure, table.T, target.T, draws)
            rows += [{"without": without or "", **row} for row in found]
    noise = [(size, *expected_maximum(size, 12, seed=draws.seed)) for size in (1, 10, 19, 100, 475)]
    # the probes of Figure 2 are on training rows, the probe of Figure 3 is the paper's
    named = {"probe_accuracy": "train_accuracy", "probe_mse": "train_mse", "lora_gain": "lora_gain_paper"}
    renamed = {new: published[old].rename(columns={old: new}) for old, new in named.items()}
    return {
        "correlations": pd.DataFrame(rows),
        "partial": pd.DataFrame(partial_rows(fig3, draws, ("ntps",))),
        "noise": pd.DataFrame(noise, columns=["configurations", "mean", "quantile"]),
        "decision": pd.DataFrame(decision_rows(fig3, draws)),
        "like_for_like": pd.DataFrame(published_steps(renamed, draws)),
    }
