"""Numbers and answers of README.md and docs/findings.md, against the CSV files that they are from."""

import re
from pathlib import Path

import pandas as pd
import pytest

from fig_plot.findings import page
from fig_plot.tables import CLAIMED, CONTROLS, FEATURE_SCORES, RUN_SCORES, load_cells, trained_models
from tests.conftest import ROOT, run_in_process
from utils.script import UserError

README, FINDINGS = ((ROOT / name).read_text() for name in ("README.md", "docs/findings.md"))
DATA = ROOT / "fig_plot" / "data"
NUMBER = r"[+-]?\d*\.\d+"
CLAIMS = {
    "more accurate probe": ("probe_accuracy", "train_accuracy", "probe_accuracy"),
    "smaller error of the probe": ("probe_mse", "train_mse", "probe_mse"),
    "smaller gain of LoRA": ("lora_gain", "lora_gain_paper", "lora_gain"),
}
NAMES = {
    "probe accuracy": "probe_accuracy",
    "probe accuracy above majority": "probe_skill",
    "probe MSE / variance": "probe_mse",
    "LoRA gain": "lora_gain",
    "full fine-tuning gain": "full_gain",
    "full fine-tuning accuracy": "full_accuracy",
    "`ntps`, the paper's score": "ntps",
    "`retained`": "retained",
    "z of `retained`": "retained_z",
    "`retained` of a random V": "retained_random",
    "`retained` - that of a random V": "retained_lead",
    "`retained` of V by PCA": "retained_pca",
    "ridge R2": "ridge_r2",
    "LogME": "logme",
    "number of classes": "num_classes",
    "bag of words": "bag_of_words_accuracy",
    "1 - probe accuracy": "headroom",
    "the other tasks' mean": "nothing",
    "R2 of a linear probe on held-out rows": "probe_r2_held_out",
    "train accuracy": "train_accuracy",
    "train MSE": "train_mse",
    "LoRA gain, paper's probe": "lora_gain_paper",
}
TRIPLE = ["value", "low", "high"]
LEADS = ["lead", "low", "high"]


def is_rounded(shown: list[str], values) -> bool:
    """Whether each number is the value, rounded to the digits that are shown."""
    return [float(text) for text in shown] == pytest.approx(
        [round(value, len(text.split(".")[1])) for text, value in zip(shown, values, strict=True)], abs=1e-12
    )


def read_page_table(text: str, marker: str) -> list[dict[str, str]]:
    """The rows of the table behind a marker, by header."""
    lines = text[text.index(f"<!-- table: {marker} -->") :].splitlines()[1:]
    lines = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def read(study: str, name: str, query: str = "", index: str | list[str] = "") -> pd.DataFrame:
    table = pd.read_csv(DATA / study / f"findings_{name}.csv")
    table = table.query(query) if query else table
    return table.set_index(index) if index else table


def rule(study: str) -> pd.DataFrame:
    """The fixed rule: Spearman across tasks, by measure and score."""
    return read(
        study, "correlations", "correlation == 'spearman' and direction == 'across tasks'", ["measure", "score"]
    )


def chosen(study: str, of: str = "") -> pd.DataFrame:
    """Layer and K chosen, mean over models, by measure."""
    return read(study, f"like_for_like{of}", "step == 'layer and K chosen' and model == 'mean'", "measure")


def layers(study: str) -> pd.DataFrame:
    """Leads of the layers that are chosen, in points."""
    return read(study, "layer_choice", index="chosen_by")[LEADS] * 100


def controls(study: str) -> pd.DataFrame:
    return read(study, "controls", "score == 'retained'", ["model", "v"])


def published() -> pd.DataFrame:
    return pd.read_csv(DATA / "published_correlations.csv", comment="#").query("direction == 'across tasks'")


# ------------------------------------------------------------------ tables
def test_first_table_of_the_readme():
    """Published means, the procedure with its noise and p, the fixed rule and the best baseline; + is as claimed."""
    of_paper, of_all, here = chosen("smollm2", "_paper"), chosen("smollm2"), rule("smollm2")
    assert set(of_paper.tasks) == {10} and set(of_all.tasks) == {14, 15}
    rows = read_page_table(README, "claims of smollm2")
    assert [row["a higher NTPS goes with a"] for row in rows] == list(CLAIMS)
    for claim, *cells in map(dict.values, rows):
        published_as, chosen_on, measure = CLAIMS[claim]
        sign = 1 if measure == "probe_accuracy" else -1
        of_models = sign * published().query(f"measure == '{published_as}'").spearman
        value, *ends = sign * here.loc[(measure, "ntps"), TRIPLE]
        name, shown = re.fullmatch(r"(.*?) ([+-]\d.*)", cells.pop()).groups()
        baseline = here.loc[(measure, NAMES[name]), TRIPLE]
        size, *ends_of_size = baseline * (1 if baseline["value"] > 0 else -1)  # nothing is claimed of a baseline
        expected = [
            [of_models.mean(), of_models.min(), of_models.max()],
            *([sign * table.spearman[chosen_on], sign * table.noise[chosen_on], table.p[chosen_on]]
              for table in (of_paper, of_all)),
            [value, *sorted(ends)],
            [size, *sorted(ends_of_size)],
        ]  # fmt: skip
        for cell, values in zip([*cells, shown], expected, strict=True):
            assert is_rounded(re.findall(NUMBER, cell), values), (claim, cell)
        rivals = ["num_classes", "bag_of_words_accuracy", *(["headroom"] if measure == "lora_gain" else [])]
        assert abs(baseline["value"]) == here.loc[measure].value[rivals].abs().max()


# table of docs/findings.md, key columns there and in the CSV file, CSV columns behind the numbers of some columns
CELLS = [
    ("like_for_like_paper", {"measure": "measure", "step": "step"}, {"here": ["spearman", "low", "high"],
        "the same in noise": ["noise", "p"],
        "here, number of classes held fixed": ["given_classes", "given_classes_low", "given_classes_high"]}),
    ("controls", {"model": "model"}, {"V": ["value"], "V - random V": ["lead_over_random", "low", "high"],
        "tasks": ["tasks"], "tasks with z > 2": ["tasks_above_2_random_z"],
        "z < -2": ["tasks_below_minus_2_random_z"]}),
    ("after_lora", {"model": "model", "score": "score"}, {"before": ["before"], "change": ["change", "low", "high"],
        "raised in": ["raised", "cells"],
        "Spearman of the change with the gain": ["spearman_with_gain", "spearman_low", "spearman_high"]}),
    ("gains", {"from": "predictors"}, {"mean absolute error, points": ["error_points"],
        "lead over the mean gain": LEADS, 'AUC of "more than 2 points"': ["auc", "auc_low", "auc_high"]}),
    ("layer_choice", {"layer": "chosen_by"}, {"probe accuracy on test rows": ["accuracy"],
        "lead over the last layer, points": ["lead", "low", "high"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "columns"), CELLS, ids=[case[0] for case in CELLS])
def test_cells_of_a_table_of_the_findings(name, keys, columns):
    if name == "gains":
        table = read("smollm2", "calibration", "measure == 'lora_gain'")
        auc = read("smollm2", "decision", "measure == 'lora_gain'", "score")[["auc", "low", "high"]]
        table = table.join(auc.set_axis(["auc", "auc_low", "auc_high"], axis=1), on="predictors")
    else:
        table = read("smollm2", name)
    if name == "controls":
        table = table.query("score == 'retained' and v == 'autoregression'")
    if name == "layer_choice":
        table[LEADS] *= 100
    table, checked = table.set_index([*keys.values()]).sort_index(), 0
    for shown in read_page_table(FINDINGS, f"{name} of smollm2"):
        key = [NAMES.get(shown[header], shown[header].strip("`")) for header in keys]
        if name == "like_for_like_paper":
            [row] = read("smollm2", name).query("model == 'mean' and measure == @key[0] and step == @key[1]").iloc
        elif tuple(key) in table.index or key[0] in table.index:
            row = table.loc[tuple(key) if len(key) > 1 else key[0]]
        else:
            continue
        for header, wanted in columns.items():
            numbers = re.findall(r"[+-]?\d*\.\d+|\d+", shown[header].replace('"more than 2"', ""))
            expected = [row[column] for column in wanted if pd.notna(row[column])]
            is_itself = key[0] in ("nothing", "last layer") and wanted[0] == "lead"
            assert len(numbers) == (0 if is_itself else len(expected)), (key, header)
            for text, value in zip(numbers, expected, strict=False):
                assert float(text) == pytest.approx(round(value, len(text.partition(".")[2])), abs=1e-12), (key, header)
            checked += len(numbers)
    assert checked > 12


def test_correlations_of_the_findings_by_score_and_measure():
    checked = 0
    for row in read_page_table(FINDINGS, "correlations of smollm2"):
        score = NAMES.get(row.pop(""))
        for header, cell in row.items():
            if score and cell:
                expected, shown = rule("smollm2").loc[(NAMES[header], score)], re.findall(NUMBER, cell)
                expected = expected[TRIPLE] if expected.members >= 8 else expected[["value"]]
                assert len(shown) == len(expected) and is_rounded(shown, expected), (score, header)
                checked += 1
    assert checked > 40


def test_tasks_of_the_findings():
    """Against the tables of collect.py: means over the seeds of a dataset."""
    tables = {name: pd.read_csv(DATA / "smollm2" / f"{name}.csv") for name in ("scores", "probes", "training")}
    scores, probes, training = (table[table.model == "smollm2"] for table in tables.values())
    scores = scores[(scores.split == "train") & ~scores.center].set_index(["eigenvectors", "subspace"]).sort_index()
    of_v = scores.loc[("largest", "autoregression")].groupby("dataset").mean(numeric_only=True)
    columns = {
        "probe": probes[probes.layer == probes.layer.max()].groupby("dataset").test_accuracy.mean(),
        "LoRA": training[training.method == "lora"].groupby("dataset").test_accuracy.mean(),
        "full fine-tuning": training[training.method == "full_finetuning"].groupby("dataset").test_accuracy.mean(),
        "`ntps`": of_v.ntps,
        "`retained`": of_v.retained,
        "`retained` of a random V": of_v.retained_random_mean,
        "`retained` of V by PCA": scores.loc[("largest", "pca")].groupby("dataset").retained.mean(),
    }
    rows = read_page_table(FINDINGS, "tasks of smollm2")
    assert len(rows) == 15
    for row in rows:
        for header, values in columns.items():
            value = values.get(row["dataset"].strip("`"), float("nan"))
            assert row[header] == ("" if pd.isna(value) else f"{value:.3f}"), (row["dataset"], header)


# ------------------------------------------------------------------ numbers in the words around the tables
def separability() -> pd.DataFrame:
    table = pd.read_csv(DATA / "smollm2" / "separability.csv")
    return table.query("group == 'first_two'").set_index(["layer", "space"])


def twin(name: str, columns: list[str]) -> list[float]:
    return [*read("smollm2", "random_weights", index="name").loc[name, columns]]


def lead_of(dataset: str) -> float:
    return trained_models(load_cells(DATA / "smollm2")).set_index("dataset").retained_lead[dataset]


SIGNED = r"([+-]\d*\.\d+)"
INTERVAL = rf"{SIGNED} \[{SIGNED}, {SIGNED}\]"
QUOTES = [
    (README, r"gives a probe that is (\d\.\d) points more", lambda: [layers("smollm2").lead["ridge_r2"]]),
    (README, rf"gives no better one \({INTERVAL}\)", lambda: layers("smollm2").loc["ntps"]),
    (README, rf"SmolLM2's error \({SIGNED}\), and so does the number of classes \({SIGNED}\)",
     lambda: rule("smollm2-docstrings").loc["probe_mse"].value[["ntps", "num_classes"]]),
    (FINDINGS, rf"is not reproduced \({SIGNED} on ten, {SIGNED} on all\)",
     lambda: [chosen("smollm2", of).spearman["lora_gain"] for of in ("_paper", "")]),
    (FINDINGS, r"accuracy \(p (\.\d+)\) and error \(p (\.\d+)\) exceed noise",
     lambda: chosen("").p[["train_accuracy", "train_mse"]]),
    (FINDINGS, rf"the error \({SIGNED} on SmolLM2\), and the number of classes does nearly as well \({SIGNED}\)",
     lambda: rule("smollm2-docstrings").loc["probe_mse"].value[["ntps", "num_classes"]]),
    (FINDINGS, r"from (\.\d+) less \(`sms_spam`\) to (\.\d+) more \(`medical`\)",
     lambda: [-lead_of("ucirvine/sms_spam"), lead_of("medical")]),
    (FINDINGS, r"`ntps` of the real datasets from (\.\d+) to (\.\d+)",
     lambda: twin("ntps", ["random_weights", "trained"])),
    (FINDINGS, rf"nearly alike \(Spearman {INTERVAL}\)",
     lambda: twin("ntps", ["spearman", "spearman_low", "spearman_high"])),
    (FINDINGS, r"`retained` rises by (\.\d+), in the trained model by (\.\d+)",
     lambda: twin("retained_change", ["random_weights", "trained"])),
    (FINDINGS, rf"fitting the labels \(difference {INTERVAL}\)", lambda: twin("retained_change", LEADS)),
    (FINDINGS, r"LoRA reaches (\.\d+) of the test texts in random weights and (\.\d+) in the trained",
     lambda: twin("lora_accuracy", ["random_weights", "trained"])),
    (FINDINGS, r"moves by up to (\.\d+) on SmolLM2",
     lambda: [moves("smollm2").largest_difference.loc["ntps_released"].max()]),
    (FINDINGS, rf"ridge R2 {SIGNED}, `ntps` {INTERVAL}, the middle layer {SIGNED} points",
     lambda: [layers("smollm2-docstrings").lead["ridge_r2"], *layers("smollm2-docstrings").loc["ntps"],
              layers("smollm2-docstrings").lead["middle layer"]]),
    (FINDINGS, r"in U \((\.\d+) of them.*?not in V \((\.\d+)\).*? p (\.\d+)\..*?gone \((\.\d+) in both",
     lambda: [*separability().leave_one_out_value[[(0, "U"), (0, "V")]], separability().leave_one_out_p[(0, "U")],
              separability().leave_one_out_value[(30, "U")]]),
]  # fmt: skip


def moves(study: str) -> pd.DataFrame:
    return pd.read_csv(DATA / study / "reproducibility_summary.csv").set_index(["score", "variant"])


@pytest.mark.parametrize(("text", "pattern", "values"), QUOTES, ids=range(len(QUOTES)))
def test_numbers_in_words(text, pattern, values):
    shown = re.search(pattern, " ".join(text.split()))
    assert shown and is_rounded(list(shown.groups()), values())


def test_sizes_of_the_studies_in_words():
    """Datasets, texts, seeds and ways of training, as the first and the last paragraphs of the findings have them."""
    datasets = pd.read_csv(DATA / "smollm2" / "datasets.csv")
    sizes = datasets.groupby("dataset").num_train.max()
    assert len(sizes) == 15 and sizes.drop("climatebert/climate_sentiment").eq(2000).all() and sizes.min() == 1000
    assert datasets.num_test.max() == 1000
    scores, training = (pd.read_csv(DATA / "smollm2" / f"{name}.csv") for name in ("scores", "training"))
    names = {name.rsplit("/")[-1].removesuffix("_title_classification") for name in scores[scores.seed == 1].dataset}
    listed = " ".join(FINDINGS.split()).split("The second seed of SmolLM2 covers")[1].split(".")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == names and len(names) == 9
    of_model = training[training.model == "smollm2"]
    with_lora = of_model[(of_model.method == "lora") & (of_model.seed == 1)].dataset
    assert names - {name.rsplit("/")[-1].removesuffix("_title_classification") for name in with_lora} == {
        "climate_sentiment"
    }
    assert of_model[of_model.method == "full_finetuning"].dataset.nunique() == 6
    models = pd.read_csv(DATA / "models.csv").num_parameters
    assert f"{models.min() / 1e6:.1f}M to {models.max() / 1e6:.1f}M" == "0.4M to 3.7M" and len(models) == 5
    tables = {name: pd.read_csv(DATA / f"{name}.csv").dataset.nunique() for name in ("scores", "training")}
    assert tables == {"scores": 19, "training": 12}
    assert pd.read_csv(DATA / "smollm2-docstrings" / "scores.csv").dataset.nunique() == 12
    row = read("smollm2", "decision", "measure == 'lora_gain' and score == 'ntps'").iloc[0]
    assert (row.above, row.tasks) == (11, 14)  # "Eleven of the fourteen tasks gain more than two points"


# ------------------------------------------------------------------ answers in words, as conditions on the CSV files
def test_answers_on_the_procedure():
    weakest = published().assign(size=published().spearman.abs()).groupby("measure")["size"].min()
    weakest = weakest[["probe_accuracy", "probe_mse", "lora_gain"]].to_numpy()
    measures = ["train_accuracy", "train_mse", "lora_gain_paper"]
    for study, of, is_within in (("smollm2", "_paper", [True] * 3), ("smollm2", "", [False, True, False]),
                                 ("", "", [True] * 3)):  # fmt: skip
        found = chosen(study, of)
        sizes = (found.spearman * pd.Series(CLAIMED))[measures].to_numpy()
        assert (sizes >= weakest).tolist() == is_within, (study, of)
        if study:
            assert (found.p[[*measures, "lora_gain"]] > 0.05).all() and abs(found.spearman["lora_gain"]) < weakest[2]
            assert (found.given_classes_low * found.given_classes_high < 0).all()
    of_docstrings = chosen("smollm2-docstrings")  # behaves as the docstring LMs do
    assert set(of_docstrings.index) == {"train_accuracy", "train_mse"} and (of_docstrings.p < 0.05).all()
    assert chosen("").p["lora_gain_paper"] > 0.05
    random = read("smollm2", "twin", "step == 'layer and K chosen'").pivot(index="measure", columns="weights")
    sizes = random.spearman.loc[["train_accuracy", "train_mse"]].abs()
    assert (sizes > 0.4).all(axis=None) and (sizes["trained"] - sizes["random"]).abs().max() < 0.15


def test_answers_on_the_fixed_rule():
    real = rule("smollm2")
    of_ntps = real.xs("ntps", level="score")
    end = of_ntps.low.where(of_ntps.index.map(CLAIMED) > 0, -of_ntps.high)
    assert len(of_ntps) >= 5 and (end < 0).all(), "on the claimed side for no outcome"
    claimed = pd.Series(CLAIMED)[["probe_accuracy", "probe_mse", "lora_gain"]]
    assert (of_ntps.value[claimed.index] * claimed < 0).all(), "all three point the other way"
    for name in ("retained", "ridge_r2", "bag_of_words_accuracy"):
        assert real.low[("probe_accuracy", name)] > 0 > real.high[("probe_mse", name)]
    of_accuracy = real.loc["probe_accuracy"].value
    assert of_accuracy[[*RUN_SCORES, *CONTROLS[:-2], *FEATURE_SCORES]].max() < of_accuracy["bag_of_words_accuracy"]
    of_gain = real.loc["lora_gain"].drop(index=["probe_accuracy", "lora_gain"], errors="ignore")
    assert (of_gain.loc[[name for name in of_gain.index if name in NAMES.values()]].eval("low * high") < 0).all()
    for study in ("", "smollm2", "smollm2-docstrings"):
        leads = read(study, "leads")
        assert not (leads[leads.score.isin(["ntps", "retained", "ridge_r2", "logme"])].low > 0).any(), study
    docstrings = rule("smollm2-docstrings")
    assert docstrings.high[("probe_mse", "ntps")] < 0 and docstrings.high[("probe_mse", "num_classes")] < 0
    lead = read("smollm2-docstrings", "leads", index=["measure", "score"]).loc[("probe_mse", "ntps")]
    assert lead.best_baseline == "num_classes" and lead.low < 0 < lead.high


def test_answers_on_random_subspaces_and_random_weights():
    own = controls("smollm2").loc[("smollm2", "autoregression")]
    assert own.low < 0 < own.high and controls("smollm2-docstrings").loc[("smollm2", "autoregression")].high < 0
    leads = trained_models(load_cells(DATA / "smollm2")).retained_lead
    assert [leads.min(), leads.max()] == [lead_of("ucirvine/sms_spam"), lead_of("medical")]
    for study in ("", "smollm2", "smollm2-docstrings"):
        table = controls(study)["lead_over_random"].unstack()
        table = table[~table.index.str.endswith("-random")]
        assert (table["pca"] > table["autoregression"]).all(), "V by PCA keeps more in every trained model"
    random = read("smollm2", "random_weights", index="name")
    assert random.low["ntps"] > 0 and random.spearman_low["ntps"] > 0.5


def test_answers_after_lora():
    changes = read("smollm2", "after_lora", index=["model", "score"])
    real, random = changes.loc["smollm2"], changes.loc["smollm2-random"]
    assert real.high["ntps"] < 0 < real.low["retained"] and real.high["retained_lead"] < 0
    assert real.raised["retained"] == real.cells["retained"] and real.spearman_low["retained"] > 0
    assert random.low["retained"] > 0 and random.tasks.eq(15).all()
    of_docstrings = read("", "after_lora", "model == 'all'", "score")
    assert of_docstrings.high["ntps"] < 0 < of_docstrings.low["retained"]
    for study in ("", "smollm2"):
        assert not (read(study, "calibration", "measure == 'lora_gain'").low > 0).any(), "none predicts the gain"


def test_answers_on_reproducibility_and_layers():
    of_seeds = read("smollm2", "seeds", index="name")
    assert (of_seeds.share[["ntps", "ridge_r2", "probe_accuracy"]] < 0.1).all()
    assert (of_seeds.share[["ntps_label", "retained_lead", "lora_gain"]] > 0.1).all()
    ladder = read("", "seeds")
    named = ["ntps", "ntps_label", "retained", "retained_z", "retained_lead", "lora_gain"]
    assert (ladder[ladder.name.isin(named)].share > 0.1).all()
    assert (ladder.query("name == 'probe_accuracy'").share < 0.1).all()
    ours = ["ntps", "ntps_label", "ntps_whitened", "retained"], ["float64 products", "4096 tokens a batch"]
    for study in ("", "smollm2"):
        difference = moves(study).largest_difference.unstack()
        assert difference.loc[ours].min(axis=None) > 0 and difference.loc[ours].max(axis=None) < 2e-6
    for study in ("smollm2", "smollm2-docstrings"):
        found = layers(study)
        assert (found.low[["ridge_r2", "logme", "middle layer"]] > 0).all() and found.low["ntps"] < 0 < found.high[
            "ntps"
        ]
    at = separability().leave_one_out_value
    assert at[(30, "U")] == at[(30, "V")]


# ------------------------------------------------------------------ page.py
def test_pages_are_what_the_csv_files_say(monkeypatch, capsys):
    assert run_in_process(monkeypatch, "fig_plot/findings/page.py", "--check") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "docs/findings.md"


def test_a_stale_table_is_found_and_mended(monkeypatch, tmp_path):
    start = "<!-- table: controls of smollm2 -->\n"
    stale = f"words\n\n{start}| 1 |\n<!-- end -->\n\nmore words\n"
    (tmp_path / "page.md").write_text(stale)
    monkeypatch.setattr(page, "PAGES", (Path("page.md"),))
    monkeypatch.setattr(page, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"page\.md is not what the CSV files say"):
        page.main(page.Config(check=True))
    assert (tmp_path / "page.md").read_text() == stale
    page.main(page.Config())
    mended = (tmp_path / "page.md").read_text()
    assert mended.startswith(f"words\n\n{start}| model |") and mended.endswith("<!-- end -->\n\nmore words\n")
    (tmp_path / "page.md").write_text("<!-- table: colours of smollm2 -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="asks for the table 'colours'"):
        page.main(page.Config())


def test_missing_cells_stay_empty_and_missing_tables_name_their_command(tmp_path):
    """Gains on one side of two points have no decision; an interval over fewer than eight tasks is not shown."""
    read("smollm2", "decision", "score != 'headroom'").to_csv(tmp_path / "findings_decision.csv", index=False)
    few = read("smollm2", "calibration").assign(tasks=7)
    few.to_csv(tmp_path / "findings_calibration.csv", index=False)
    rows = {row.split(" | ")[0]: row.split(" | ") for row in page.markdown(page.gains(tmp_path)).splitlines()}
    headroom, ridge = rows["| 1 - probe accuracy"], rows["| ridge R2"]
    assert headroom[3].strip(" |") == "" and re.match(r"0\.\d\d \[", ridge[3])
    assert re.fullmatch(r"[+-]\d\.\d", ridge[2])
    with pytest.raises(UserError, match=r"findings_controls\.csv\. Run: python -m fig_plot\.findings"):
        page.controls(tmp_path)


def test_overview_points_where_the_paper_points():
    rows = page.overview_rows().set_index(["claim", "label"])
    assert rows.value[("smaller gain of LoRA", "published, mean and range of 8 models")] > 0
    for claim, (_, _, measure) in CLAIMS.items():
        sign = 1 if measure == "probe_accuracy" else -1
        expected = sign * rule("smollm2").loc[(measure, "ntps"), TRIPLE]
        row = rows.loc[(claim, "fixed rule, test rows: SmolLM2-135M")]
        assert [row.value, row.low, row.high] == pytest.approx([expected["value"], *sorted(expected[["low", "high"]])])
    assert (rows.value[rows.note.notna()] > 0).all(), "a baseline is drawn by its size"
