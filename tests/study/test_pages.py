"""Numbers that the README and docs/findings.md quote, against the CSV files that they are from."""

import re
from pathlib import Path

import pandas as pd
import pytest

from fig_plot.findings import page
from fig_plot.tables import CLAIMED, load_cells, trained_models
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
COLUMNS = {
    "probe accuracy": "probe_accuracy",
    "probe accuracy above majority": "probe_skill",
    "probe MSE / variance": "probe_mse",
    "LoRA gain": "lora_gain",
    "full fine-tuning gain": "full_gain",
    "full fine-tuning accuracy": "full_accuracy",
}
SCORES = {
    "`ntps`, the paper's score": "ntps",
    "`retained`": "retained",
    "z of `retained`": "retained_z",
    "`retained` of a random V": "retained_random",
    "ridge R2": "ridge_r2",
    "number of classes": "num_classes",
    "bag of words": "bag_of_words_accuracy",
    "1 - probe accuracy": "headroom",
}


def is_rounded(shown: list[str], values) -> bool:
    """Whether each number is the value, rounded to the digits that are shown."""
    return [float(text) for text in shown] == pytest.approx(
        [round(value, len(text.split(".")[1])) for text, value in zip(shown, values, strict=True)], abs=1e-12
    )


def table_after(text: str, marker: str) -> list[list[str]]:
    """The cells of the first table behind a marker, header first."""
    lines = text[text.index(marker) :].splitlines()[1:]
    lines = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("| ---")]


def read(study: str, name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / study / f"findings_{name}.csv")


def test_first_table_of_the_readme():
    """Published means, the procedure with its noise and p, the fixed rule and the best baseline; + is as claimed."""
    theirs = pd.read_csv(DATA / "published_correlations.csv", comment="#").query("direction == 'across tasks'")
    steps, steps_of_paper = (
        read("smollm2", name).query("step == 'layer and K chosen' and model == 'smollm2'")
        for name in ("like_for_like", "like_for_like_paper")
    )
    assert set(steps_of_paper.tasks) == {10} and set(steps.tasks) == {14, 15}
    rule = read("smollm2", "correlations").query("correlation == 'spearman' and direction == 'across tasks'")
    rows = table_after(README, "<!-- table: claims of smollm2 -->")[1:]
    assert [row[0] for row in rows] == list(CLAIMS)
    for claim, published, of_paper, of_all, fixed, baseline in rows:
        published_as, chosen_on, measure = CLAIMS[claim]
        sign = 1 if measure == "probe_accuracy" else -1
        of_models = sign * theirs[theirs.measure == published_as].spearman
        assert is_rounded(re.findall(NUMBER, published), [of_models.mean(), of_models.min(), of_models.max()])
        for same, table in ((of_paper, steps_of_paper), (of_all, steps)):
            [chosen] = table[table.measure == chosen_on].itertuples()
            assert is_rounded(re.findall(NUMBER, same), [sign * chosen.spearman, sign * chosen.noise, chosen.p])
        here = rule[rule.measure == measure].set_index("score")[["value", "low", "high"]]
        value, *ends = sign * here.loc["ntps"]
        assert is_rounded(re.findall(NUMBER, fixed), [value, *sorted(ends)])
        name, shown = re.fullmatch(r"(.*?) ([+-]\d.*)", baseline).groups()
        turned = 1 if here.value[SCORES[name]] > 0 else -1  # nothing is claimed of a baseline
        value, *ends = turned * here.loc[SCORES[name]]
        assert is_rounded(re.findall(NUMBER, shown), [value, *sorted(ends)])
        rivals = ["num_classes", "bag_of_words_accuracy", *(["headroom"] if measure == "lora_gain" else [])]
        assert abs(here.value[SCORES[name]]) == here.value[rivals].abs().max()


def test_numbers_in_the_words_of_the_readme():
    words = " ".join(README.split())
    rule = read("smollm2-docstrings", "correlations").query("correlation == 'spearman' and measure == 'probe_mse'")
    values = rule[rule.direction == "across tasks"].set_index("score").value
    shown = re.search(r"SmolLM2's error \((-\.\d+)\).*?nearly as well \((-\.\d+)\), a random.*? \((-\.\d+)\)", words)
    assert shown and is_rounded(list(shown.groups()), values[["ntps", "num_classes", "retained_random"]])
    layers = read("smollm2", "layer_choice").set_index("chosen_by")[["lead", "low", "high"]] * 100
    shown = re.search(
        r"read (\d\.\d) points better than the last one, .*? no better \((-\d\.\d) \[(-\d\.\d), (\+\d\.\d)\]\), "
        r"the middle layer, .*? (\d\.\d) better; on the docstring tasks (\d\.\d), (\d\.\d) and (\d\.\d) points",
        words,
    )
    of_docstrings = read("smollm2-docstrings", "layer_choice").set_index("chosen_by")[["lead", "low", "high"]] * 100
    expected = [layers.lead["ridge_r2"], *layers.loc["ntps"], layers.lead["middle layer"]]
    expected += [*of_docstrings.lead[["ridge_r2", "ntps", "middle layer"]]]
    assert shown and is_rounded(list(shown.groups()), expected)
    for table in (layers, of_docstrings):
        assert (table.low[["ridge_r2", "logme", "middle layer"]] > 0).all()
        assert table.low["ntps"] < 0 < table.high["ntps"]
    real = read("smollm2", "correlations").query("correlation == 'spearman' and score == 'ntps'").set_index("measure")
    claimed = pd.Series(CLAIMED)[["probe_accuracy", "probe_mse", "lora_gain"]]
    assert (real.value[claimed.index] * claimed < 0).all(), "all three point the other way"
    ladder = read("", "like_for_like").query("step == 'layer and K chosen' and model == 'mean'").set_index("measure")
    of_docstrings = read("smollm2-docstrings", "like_for_like").query(
        "step == 'layer and K chosen' and model == 'mean'"
    )
    for table in (ladder, of_docstrings.set_index("measure")):
        assert (table.p[["train_accuracy", "train_mse"]] < 0.05).all()
    controls = (
        read(study, "controls").set_index(["model", "score", "v"]) for study in ("smollm2", "smollm2-docstrings")
    )
    real, docstrings = (table.loc[("smollm2", "retained", "autoregression")] for table in controls)
    assert real.low < 0 < real.high and docstrings.high < 0


@pytest.mark.parametrize("study", ["smollm2", "docstrings"])
def test_correlations_of_the_findings_by_score_and_measure(study):
    folder = "" if study == "docstrings" else study
    rule = read(folder, "correlations").query("correlation == 'spearman' and direction == 'across tasks'")
    rule = rule.set_index(["score", "measure"])
    header, *rows = table_after(FINDINGS, f"<!-- table: correlations of {study} -->")
    found = {row[0]: row for row in rows}
    checked = 0
    for label, score in SCORES.items():
        for column, cell in list(zip(header, found[label], strict=True))[1:]:
            if cell:
                row, shown = rule.loc[(score, COLUMNS[column])], re.findall(NUMBER, cell)
                expected = row[["value", "low", "high"]] if row.members >= 8 else row[["value"]]
                assert len(shown) == len(expected) and is_rounded(shown, expected), (label, column)
                checked += 1
    assert checked > 25


def test_random_subspaces_and_lora_of_the_findings():
    rows = {row[0]: row for row in table_after(FINDINGS, "<!-- table: controls of smollm2 -->")}
    row = rows["`smollm2`"]
    table = read("smollm2", "controls").query("score == 'retained' and model == 'smollm2'").set_index("v")
    own = table.loc["autoregression"]
    values = [*table.value[["autoregression", "random", "pca"]]]
    values += [*own[["lead_over_random", "low", "high"]], *table.loc["pca", ["lead_over_random", "low", "high"]]]
    assert is_rounded(re.findall(NUMBER, " ".join(row[2:7])), values)
    assert row[7:] == [f"{own.tasks_above_2_random_z:.0f}", f"{own.tasks_below_minus_2_random_z:.0f}"]
    changes = read("smollm2", "after_lora")
    shown = table_after(FINDINGS, "<!-- table: after_lora of smollm2 -->")[1:]
    for cells, (_, change) in zip(shown, changes.iterrows(), strict=True):
        assert cells[0] == f"`{change.model}`"
        assert is_rounded(re.findall(NUMBER, cells[3]), change[["change", "low", "high"]])
        assert cells[4] == f"{change.raised} of {change.cells}"


def test_numbers_in_the_words_of_the_findings():
    words = " ".join(FINDINGS.split())
    apart = (
        pd.read_csv(DATA / "smollm2" / "separability.csv").query("group == 'first_two'").set_index(["layer", "space"])
    )
    at = apart.leave_one_out_value
    shown = re.search(r"in U \((\.\d+) of them.*?not in V \((\.\d+)\).*?p (\.\d+)\..*?gone \((\.\d+) in both\)", words)
    assert shown and is_rounded(
        list(shown.groups()), [at[(0, "U")], at[(0, "V")], apart.leave_one_out_p[(0, "U")], at[(30, "U")]]
    )
    assert at[(30, "U")] == at[(30, "V")]
    released, shares = [], []
    for study in ("", "smollm2"):
        moves = pd.read_csv(DATA / study / "reproducibility_summary.csv").set_index(["score", "variant"])
        share, moves = moves.share.unstack(), moves.largest_difference.unstack()
        ours = ["ntps", "ntps_label", "ntps_whitened", "retained"], ["float64 products", "4096 tokens a batch"]
        assert moves.loc[ours].min(axis=None) > 0 and moves.loc[ours].max(axis=None) < 2e-6
        assert share.loc[ours].max(axis=None) < 6e-5
        released.append(moves.loc["ntps_released"].max())
        shares.append(share.loc["ntps_released"].max())
    shown = re.search(
        r"moves by \.003 to (\.\d+), and by up to (\.\d+) on SmolLM2: .*? to (\d\.\d+) and (\.\d+),", words
    )
    assert shown and is_rounded(list(shown.groups()), [*released, *shares])
    of_bfloat16 = "ntps_label", "bfloat16 model"  # of SmolLM2, the last one
    shown = re.search(r"`ntps_label` differs by up to (\.\d+), a share of (\.\d+)\.", words)
    assert shown and is_rounded(list(shown.groups()), [moves.loc[of_bfloat16], share.loc[of_bfloat16]])
    for study, of in (("smollm2", "tasks, of which"), ("", "runs on 12 tasks, of which")):
        row = read(study, "decision").query("measure == 'lora_gain' and score == 'ntps'").iloc[0]
        assert f"{row.cells} {of} {row.above} gain" in words and row.tasks in (12, row.cells)


# ------------------------------------------------------------------ answers in words
def test_answers_of_the_findings_are_those_of_their_tables():
    """The sentences under "In short" and behind the tables, as conditions on the CSV files."""
    rule = read("smollm2", "correlations").query("correlation == 'spearman' and direction == 'across tasks'")
    of_ntps = rule[rule.score == "ntps"]
    end = of_ntps.low.where(of_ntps.measure.map(CLAIMED) > 0, -of_ntps.high)
    assert len(of_ntps) >= 5 and (end < 0).all(), "orders tasks by nothing in the direction that is claimed"
    assert (rule[(rule.measure == "probe_accuracy") & rule.score.isin(["retained", "ridge_r2"])].low > 0).all()
    chosen = read("smollm2", "like_for_like").query("step == 'layer and K chosen' and model == 'smollm2'")
    assert (chosen.p > 0.05).all(), "no more than choosing"
    published = pd.read_csv(DATA / "published_correlations.csv", comment="#").query("direction == 'across tasks'")
    weakest = published.assign(size=published.spearman.abs()).groupby("measure")["size"].min()
    for table, reproduced in (("like_for_like_paper", [True, True, True]), ("like_for_like", [False, True, False])):
        found = read("smollm2", table).query("step == 'layer and K chosen' and model == 'mean'").set_index("measure")
        measures = ["train_accuracy", "train_mse", "lora_gain_paper"]
        sizes = found.spearman[measures].abs().to_numpy()
        assert (sizes >= weakest[["probe_accuracy", "probe_mse", "lora_gain"]].to_numpy()).tolist() == reproduced
        assert (found.p[measures] > 0.05).all() and (found.given_classes_low * found.given_classes_high < 0).all()
    ladder = read("", "like_for_like").query("step == 'layer and K chosen' and model == 'mean'").set_index("measure")
    assert (ladder.p[["train_accuracy", "train_mse"]] < 0.05).all() and ladder.p["lora_gain_paper"] > 0.5
    assert ladder.given_classes_low["train_accuracy"] > 0 > ladder.given_classes_high["train_mse"]
    of_error = read("smollm2", "partial").query("measure == 'probe_mse' and score == 'ntps'").iloc[0]
    assert of_error.given == "num_classes" and of_error.low < 0 < of_error.high
    of_skill = read("", "partial").query("measure == 'probe_skill' and score == 'ntps'").iloc[0]
    shown = re.search(r"held fixed \((\+\.\d+) \[(\+\.\d+), (\+\.\d+)\]", " ".join(FINDINGS.split()))
    assert shown and is_rounded(list(shown.groups()), of_skill[["value", "low", "high"]])
    of_lead = rule[rule.score.isin(["retained_lead", "retained_random_z"]) & (rule.members >= 8)]
    assert len(of_lead) >= 8 and (of_lead[of_lead.score == "retained_lead"].eval("low * high") < 0).all()
    for study in ("", "smollm2"):
        leads = read(study, "leads")
        assert not (leads[leads.score.isin(["ntps", "retained", "ridge_r2", "logme"])].low > 0).any(), study
        assert not (read(study, "calibration").query("measure == 'lora_gain'").low > 0).any(), study
    lead = (
        read("smollm2", "controls")
        .query("score == 'retained' and v == 'autoregression'")
        .set_index("model")
        .loc["smollm2"]
    )
    assert lead.low < 0 < lead.high
    leads = trained_models(load_cells(DATA / "smollm2")).set_index("dataset").retained_lead
    shown = re.search(r"from (\.\d+) less \(`sms_spam`\) to (\.\d+) more \(`medical`\)", " ".join(FINDINGS.split()))
    ends = leads[["ucirvine/sms_spam", "medical"]]
    assert shown and is_rounded(list(shown.groups()), ends.abs()) and ends.tolist() == [leads.min(), leads.max()]
    twin = read("smollm2", "random_weights").set_index("name")
    assert f"{twin.trained['ntps']:.2f} {twin.random_weights['ntps']:.2f}" == "0.62 0.55" and twin.low["ntps"] > 0
    assert (twin.trained["ntps"] - 0.5) / (twin.random_weights["ntps"] - 0.5) > 2
    assert (twin.spearman_low[["ntps", "h_oas", "ridge_r2", "logme"]] > 0.5).all()
    of_tiny = read("", "random_weights").set_index("name").loc["ntps"]
    assert f"{of_tiny.trained:.3f}" == f"{of_tiny.random_weights:.3f}" and of_tiny.low < 0 < of_tiny.high
    changes = read("smollm2", "after_lora").query("model == 'smollm2'").set_index("score")
    assert changes.high["ntps"] < 0 < changes.low["retained"] and changes.high["retained_lead"] < 0
    of_docstrings = read("", "after_lora").query("model == 'all'").set_index("score")
    assert of_docstrings.high["ntps"] < 0 < of_docstrings.low["retained"]
    assert of_docstrings.spearman_with_gain["retained"] < 0
    of_gain = rule[(rule.measure == "lora_gain") & rule.score.isin(["ntps", "retained", "ridge_r2", "logme", "h_oas"])]
    assert len(of_gain) == 5 and (of_gain.low * of_gain.high < 0).all(), "no score has an interval off 0"


def test_answers_on_reproducibility():
    of_seeds = read("smollm2", "seeds").set_index("name")
    shown = re.search(r"by (\.\d+) \[(\.\d+), (\.\d+)\] of its spread over nine", " ".join(FINDINGS.split()))
    assert shown and is_rounded(list(shown.groups()), of_seeds.loc["ntps", ["share", "low", "high"]])
    assert (of_seeds.high[["ntps", "ridge_r2", "probe_accuracy"]] < 0.1).all()
    assert of_seeds.share["retained"] < 0.1 < of_seeds.high["retained"]
    assert (of_seeds.share[["retained_lead", "lora_gain", "retained_z", "ntps_label"]] > 0.1).all()
    assert of_seeds.tasks[["ntps", "lora_gain"]].tolist() == [9, 8]
    of_ladder = read("", "seeds")
    named = ["ntps", "ntps_label", "retained", "retained_z", "retained_lead", "lora_gain"]
    assert (of_ladder[of_ladder.name.isin(named)].share > 0.1).all()
    assert (of_ladder.query("name == 'probe_accuracy'").share < 0.1).all()


def test_gain_of_lora_over_a_converged_probe_is_not_reproduced():
    published = pd.read_csv(DATA / "published_correlations.csv", comment="#").query("direction == 'across tasks'")
    weakest = published[published.measure == "lora_gain"].spearman.abs().min()
    for gain in ("lora_gain", "lora_gain_paper"):  # over a converged probe on neither set of datasets
        for table, is_within in (("like_for_like_paper", gain.endswith("paper")), ("like_for_like", False)):
            found = read("smollm2", table).query(
                f"step == 'layer and K chosen' and model == 'mean' and measure == '{gain}'"
            )
            assert (found.spearman.abs() >= weakest).all() == is_within
    shown = re.search(r"over a converged probe on neither \((-\.\d+), (-\.\d+)\)", " ".join(FINDINGS.split()))
    tables = (
        read("smollm2", name).set_index(["measure", "model", "step"])
        for name in ("like_for_like_paper", "like_for_like")
    )
    expected = [table.spearman[("lora_gain", "mean", "layer and K chosen")] for table in tables]
    assert shown and is_rounded(list(shown.groups()), expected)


def test_what_is_said_of_lora_on_random_weights():
    twin = read("smollm2", "random_weights").set_index("name")
    words = " ".join(FINDINGS.split())
    shown = re.search(r"less: (\.\d+) of the test texts are right, where the trained model has (\.\d+) \(", words)
    assert shown and is_rounded(list(shown.groups()), twin.loc["lora_accuracy", ["random_weights", "trained"]])
    shown = re.search(r"rises by (\.\d+) there, and by (\.\d+) in the trained model on the same datasets", words)
    assert shown and is_rounded(list(shown.groups()), twin.loc["retained_change", ["random_weights", "trained"]])
    shown = re.search(r"whatever weights \(difference (-\.\d+) \[(-\.\d+), (\+\.\d+)\]\)", words)
    assert shown and is_rounded(list(shown.groups()), twin.loc["retained_change", ["lead", "low", "high"]])
    shown = re.search(r"rises in random weights \(difference (-\.\d+) \[(-\.\d+), (-\.\d+)\]\)", words)
    assert shown and is_rounded(list(shown.groups()), twin.loc["ntps_change", ["lead", "low", "high"]])
    of_twin = read("smollm2", "after_lora").query("model == 'smollm2-random'").set_index("score")
    assert of_twin.low["retained"] > 0 and of_twin.low["ntps"] < 0 < of_twin.change["ntps"]
    assert of_twin.tasks.eq(15).all() and twin.tasks["full_accuracy"] == 6


def test_answers_on_the_docstring_tasks_of_smollm2():
    """The sentences of "The docstring tasks on SmolLM2", and those of the first pages that come from them."""
    study, words = "smollm2-docstrings", " ".join(FINDINGS.split())
    rule = read(study, "correlations").query("correlation == 'spearman' and direction == 'across tasks'")
    rule = rule.set_index(["measure", "score"])
    assert (
        rule.high[("probe_mse", "ntps")] < 0 < rule.low[("probe_skill", "ntps")]
        and rule.high[("probe_mse", "num_classes")] < 0
    )
    chosen = read(study, "like_for_like").query("step == 'layer and K chosen' and model == 'smollm2'")
    assert set(chosen.measure) == {"train_accuracy", "train_mse"} and (chosen.p < 0.05).all()
    partial = read(study, "partial").query("score == 'ntps' and given == 'num_classes'").set_index("measure")
    lead = read(study, "leads").set_index(["measure", "score"]).loc[("probe_mse", "ntps")]
    interval = r"([+-]\.\d+) \[([+-]\.\d+), ([+-]\d?\.\d+)\]"
    for said, values in (
        (rf"\({interval} for MSE / variance", partial.loc["probe_mse", ["value", "low", "high"]]),
        (rf", {interval} for accuracy above majority", partial.loc["probe_skill", ["value", "low", "high"]]),
        (rf"is open \({interval}", lead[["lead", "low", "high"]]),
    ):
        shown = re.search(said, words)
        assert shown and is_rounded(list(shown.groups()), values), said
    assert (partial.high["probe_mse"] < 0 < partial.low["probe_skill"]) and lead.low < 0 < lead.high
    assert lead.best_baseline == "num_classes" and not (read(study, "leads").query("score == 'ntps'").low > 0).any()
    own = read(study, "controls").query("score == 'retained' and v == 'autoregression'").iloc[0]
    assert own.high < 0 and own.tasks_above_2_random_z == 0
    shared = read(study, "shared_tasks").set_index("name")
    assert (shared.value[["probe_skill", "probe_mse", "ridge_r2", "retained_z"]] > 0.9).all()
    assert shared.value["ntps"] < 0.6 and shared.between_others["ntps"] < 0.3


def test_random_weights_follow_the_outcomes_as_well():
    table = read("smollm2", "twin").query("step == 'layer and K chosen'").pivot(index="measure", columns="weights")
    sizes = table.spearman.loc[["train_accuracy", "train_mse"]].abs()
    assert (sizes > 0.4).all(axis=None) and (table.p > 0.05).all(axis=None)
    assert (sizes["trained"] - sizes["random"]).abs().max() < 0.15


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
    assert table_after(mended, start) == table_after(FINDINGS, start)
    (tmp_path / "page.md").write_text("<!-- table: colours of smollm2 -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="asks for the table 'colours'"):
        page.main(page.Config())


def test_gains_on_one_side_of_two_points_leave_the_decision_empty_and_missing_tables_name_their_command(tmp_path):
    for name in ("calibration", "decision"):
        read("smollm2", name).query("score != 'headroom'" if name == "decision" else "error_points > 0").to_csv(
            tmp_path / f"findings_{name}.csv", index=False
        )
    rows = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in page.one_by_one("gains", tmp_path)}
    assert rows["1 - probe accuracy"] == "" and re.match(r"0\.\d\d \[", rows["ridge R2"])
    with pytest.raises(UserError, match=r"findings_controls\.csv\. Run: python -m fig_plot\.findings"):
        page.controls(tmp_path)


def test_overview_points_where_the_paper_points():
    rows = page.overview_rows().set_index(["claim", "label"])
    assert (
        rows.value[[("smaller gain of LoRA", label) for label in rows.loc["smaller gain of LoRA"].index[:1]]] > 0
    ).all()
    fixed = "fixed rule, test rows: SmolLM2-135M"
    rule = read("smollm2", "correlations").query("correlation == 'spearman' and score == 'ntps'").set_index("measure")
    for claim, measure, sign in (
        ("more accurate probe", "probe_accuracy", 1),
        ("smaller error of the probe", "probe_mse", -1),
        ("smaller gain of LoRA", "lora_gain", -1),
    ):
        row = rows.loc[(claim, fixed)]
        ends = sorted(sign * rule.loc[measure, ["low", "high"]])
        assert [row.value, row.low, row.high] == pytest.approx([sign * rule.value[measure], *ends])
    assert (rows.value[rows.note.notna()] > 0).all(), "a baseline is drawn by its size"
