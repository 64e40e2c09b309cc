"""Numbers and answers of README.md and docs/findings.md, against the CSV files that they are from."""

import re
from pathlib import Path

import pandas as pd
import pytest

from fig_plot.findings import page
from fig_plot.tables import CLAIMED, load_cells, trained_models
from tests.conftest import ROOT, run_in_process
from utils.script import UserError

README, FINDINGS, SCORES = ((ROOT / name).read_text() for name in ("README.md", "docs/findings.md", "docs/scores.md"))
DATA = ROOT / "fig_plot" / "data"
LEADS, BOTH = ["lead", "low", "high"], ["random_weights", "trained"]


def is_rounded(shown: list[str], values) -> bool:
    """True if each number is the value, rounded to the digits that are shown."""
    return [float(text) for text in shown] == pytest.approx(
        [round(value, len(text.split(".")[1])) for text, value in zip(shown, values, strict=True)], abs=1e-12
    )


def table(study: str, name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / study / f"{name}.csv")


def read(study: str, name: str, query: str = "", index: str | list[str] = "") -> pd.DataFrame:
    found = table(study, f"findings_{name}")
    found = found.query(query) if query else found
    return found.set_index(index) if index else found


def rule(study: str) -> pd.DataFrame:
    """The fixed rule: Spearman across tasks, by measure and score."""
    return read(study, "correlations", "direction == 'across tasks'", ["measure", "score"])


def chosen(study: str, of: str = "") -> pd.DataFrame:
    """Layer and K chosen, mean over models, by measure."""
    return read(study, f"like_for_like{of}", "step == 'layer and K chosen' and model == 'mean'", "measure")


def layers(study: str) -> pd.DataFrame:
    """Leads of the layers that are chosen, in points."""
    return read(study, "layer_choice", index="chosen_by")[LEADS] * 100


def controls(study: str) -> pd.DataFrame:
    return read(study, "controls", "score == 'retained'", ["model", "v"])


# ------------------------------------------------------------------ numbers in the words around the tables
def twin(name: str, columns: list[str], study: str) -> list[float]:
    return [*read(study, "random_weights", index="name").loc[name, columns]]


def rise_by_lora(study: str) -> list[float]:
    return [*twin("retained_change", [*BOTH, *LEADS], study), *twin("lora_accuracy", BOTH, study)]


CHOSEN_ON = ["train_accuracy", "train_mse", "lora_gain_paper"]
SIGNED = r"([+-]\d*\.\d+)"
INTERVAL = rf"{SIGNED} \[{SIGNED}, {SIGNED}\]"
QUOTES = [
    (README, r"layer of the highest R2 is (\d\.\d) points more", lambda: [layers("smollm2").lead["ridge_r2"]]),
    (README, rf"layer of the highest NTPS this difference is {INTERVAL}", lambda: layers("smollm2").loc["ntps"]),
    (README, rf"Gemma: accuracy {SIGNED}, error {SIGNED}, gain {SIGNED}\)",
     lambda: rule("gemma3-270m").value[[(name, "ntps") for name in ("probe_accuracy", "probe_mse", "lora_gain")]]),
    (README, rf"SmolLM2's error \({SIGNED}\), and so does the number of classes \({SIGNED}\)",
     lambda: rule("smollm2-docstrings").loc["probe_mse"].value[["ntps", "num_classes"]]),
    (README, r"by (\.\d+) and (\.\d+) on the fifteen datasets of SmolLM2, by (\.\d+) and (\.\d+) on the same",
     lambda: [rise_by_lora(study)[i] for study in ("smollm2", "gemma3-270m") for i in (1, 0)]),
    (FINDINGS, rf"we do not reproduce the correlation with the gain \({SIGNED} on ten, {SIGNED} on all\)",
     lambda: [chosen("smollm2", of).spearman["lora_gain"] for of in ("_paper", "")]),
    (FINDINGS, r"accuracy \(p (\.\d+)\) and error \(p (\.\d+)\) exceed noise",
     lambda: chosen("").p[["train_accuracy", "train_mse"]]),
    (FINDINGS, rf"the error \({SIGNED} on SmolLM2\), and the number of classes does nearly as well \({SIGNED}\)",
     lambda: rule("smollm2-docstrings").loc["probe_mse"].value[["ntps", "num_classes"]]),
    (FINDINGS, r"from (\.\d+) less \(`sms_spam`\) to (\.\d+) more \(`medical`\)",
     lambda: trained_models(load_cells(DATA / "smollm2")).set_index("dataset").retained_lead[
         ["ucirvine/sms_spam", "medical"]] * [-1, 1]),
    (FINDINGS, rf"`ntps` of the real datasets from (\.\d+) to (\.\d+),.*? nearly alike \(Spearman {INTERVAL}\).*?"
               rf" training raises it from (\.\d+) to (\.\d+), .*?\(Spearman {INTERVAL}; ",
     lambda: [value for study in ("smollm2", "gemma3-270m") for value in twin(
         "ntps", [*BOTH, "spearman", "spearman_low", "spearman_high"], study)]),
    (FINDINGS, rf"`retained` rises by (\.\d+), in the trained model by (\.\d+)\..*?labels \(difference {INTERVAL}\).*?"
               r"LoRA is (\.\d+) with random weights and (\.\d+) in the trained", lambda: rise_by_lora("smollm2")),
    (FINDINGS, rf"rises by (\.\d+), in Gemma by (\.\d+) \(difference {INTERVAL}; .*?LoRA is "
               r"(\.\d+) and (\.\d+)\).*?before LoRA it is (\.\d+), and (\.\d+) in the twin",
     lambda: [*rise_by_lora("gemma3-270m"), *twin("retained", BOTH[::-1], "gemma3-270m")]),
    (SCORES, rf"H-score's is best \(lead {SIGNED} points \[{SIGNED}, {SIGNED}\]\)",
     lambda: read("", "calibration", "measure == 'lora_gain_paper'", "predictors").loc["h_oas", LEADS]),
    (FINDINGS, r"moves by up to (\.\d+) on SmolLM2 and (\.\d+) on Gemma",
     lambda: [table(study, "reproducibility_summary").query("score == 'ntps_released'").largest_difference.max()
              for study in ("smollm2", "gemma3-270m")]),
    (FINDINGS, r"share of `ntps` is (\.\d+) \[(\.\d+), (\.\d+)\] on SmolLM2 .*? (\.\d+) \[(\.\d+), (\.\d+)\] on Gemma",
     lambda: [read(study, "seeds", index="name").loc["ntps", end] for study in ("smollm2", "gemma3-270m")
              for end in ("share", "low", "high")]),
    (FINDINGS, rf"contain 0 as well \(Gemma {INTERVAL}, SmolLM2 {INTERVAL}\)",
     lambda: read("", "special", "place == 'middle'", "models").loc[
         ["gemma3-270m", "smollm2"], ["value", "low", "high"]].to_numpy().ravel()),
    (FINDINGS, rf"last layer by (\d\.\d) points, the middle one by (\d\.\d) .*?`ntps` leads the last by (\d\.\d) "
               rf"\[{SIGNED}, {SIGNED}\]",
     lambda: [layers("smollm2-docstrings").lead["ridge_r2"],
              100 * read("smollm2-docstrings", "layer_choice", index="chosen_by").over_middle["ridge_r2"],
              *layers("smollm2-docstrings").loc["ntps"]]),
    (FINDINGS, rf"the mean errs by (\d\.\d) points, and the best line, that of ridge R2, by (\d\.\d) \(lead {INTERVAL}",
     lambda: [*(gain := read("smollm2", "calibration", "measure == 'lora_gain'", "predictors")).error_points[
         ["nothing", "ridge_r2"]], *gain.loc["ridge_r2", LEADS]]),
    (FINDINGS, rf"accuracy after LoRA, (\.\d+) \(lead {INTERVAL}\); `ntps` orders (\.\d+) of them correctly by the "
               r"best layer, and (\.\d+) by LoRA",
     lambda: [*(found := read("", "which_model", "models == 'all'", ["outcome", "score"])).loc[
         ("lora_accuracy", "logme"), ["share", "lead", "lead_low", "lead_high"]],
              *found.share[[("best_test_accuracy", "ntps"), ("lora_accuracy", "ntps")]]]),
    (FINDINGS, r"on (\.\d+) to (\.\d+) of the shared docstring tasks",
     lambda: read("", "special", "statistic == 'same sign' and models != 'gemma3-270m, smollm2'").value.agg(
         ["min", "max"])),
    (FINDINGS, rf"training accuracy {SIGNED} and error {SIGNED} lie within the published range, and noise "
               rf"reaches {SIGNED} and {SIGNED} \(p (\.\d+) and (\.\d+)\)",
     lambda: chosen("gemma3-270m", "_paper").loc[CHOSEN_ON[:2], ["spearman", "noise", "p"]].to_numpy().T.ravel()),
    (FINDINGS, rf"On Gemma the signs are opposite to the claims: {INTERVAL} with accuracy and, outside 0, {INTERVAL}",
     lambda: [rule("gemma3-270m").loc[(name, "ntps"), end] for name in ("probe_accuracy", "probe_mse")
              for end in ("value", "low", "high")]),
    (FINDINGS, rf"falls on SmolLM2 and on Gemma \({INTERVAL}\).*?of both \({INTERVAL} on Gemma\).*?\(Gemma {INTERVAL}\)"
               rf".*?on Gemma too \({INTERVAL}",
     lambda: [*(found := read("gemma3-270m", "after_lora", "model == 'gemma3-270m'", "score")[
         ["change", "low", "high", "spearman_with_gain", "spearman_low", "spearman_high"]]).loc["ntps"].iloc[:3],
              *found.loc["retained"], *found.loc["retained_lead"].iloc[:3]]),
    (FINDINGS, rf"correlation of Gemma with LoRA's gain is {SIGNED} over the paper's probe and {SIGNED} over a "
               rf"converged one, and noise reaches {SIGNED} and {SIGNED}",
     lambda: chosen("gemma3-270m", "_paper").loc[["lora_gain_paper", "lora_gain"], ["spearman", "noise"]]
     .to_numpy().T.ravel()),
    (FINDINGS, rf"On Gemma `retained` less that of a random V follows the gain \({INTERVAL}",
     lambda: rule("gemma3-270m").loc[("lora_gain", "retained_lead"), ["value", "low", "high"]]),
    (FINDINGS, rf"on Gemma V leads random V by {INTERVAL}.*?with random weights does V keep more \({INTERVAL}\)",
     lambda: controls("gemma3-270m").loc[[(f"gemma3-270m{of}", "autoregression") for of in ("", "-random")],
                                         ["lead_over_random", "low", "high"]].to_numpy().ravel()),
    (FINDINGS, rf"leads the last one by (\d\.\d) points on SmolLM2 and by (\d\.\d) on Gemma, and the middle one by "
               rf"(\d\.\d) \[{SIGNED}, {SIGNED}\] and (\d\.\d) \[{SIGNED}, {SIGNED}\]",
     lambda: [100 * read(study, "layer_choice", index="chosen_by").loc["ridge_r2", name]
              for columns in (["lead"], ["over_middle", "over_middle_low", "over_middle_high"])
              for study in ("smollm2", "gemma3-270m") for name in columns]),
    (FINDINGS, rf"the leads order the datasets alike \(Spearman {INTERVAL}\)",
     lambda: read("", "special", "models == 'gemma3-270m, smollm2' and statistic == 'Spearman'").iloc[0][
         ["value", "low", "high"]]),
    (FINDINGS, rf"on Gemma from {INTERVAL} to {INTERVAL}, on SmolLM2 from {INTERVAL} to {INTERVAL}",
     lambda: read("", "coordinates", "layer in (18, 30) and score == 'ntps'", ["model", "coordinates"]).loc[
         [("gemma3-270m", "prefix_standardized"), ("gemma3-270m", "standardized"), ("smollm2", "as_is"),
          ("smollm2", "standardized")],
         ["probe_accuracy", "probe_accuracy_low", "probe_accuracy_high"]].to_numpy().ravel()),
    (FINDINGS, r"in U \((\.\d+) of them.*?not in V \((\.\d+)\).*? p (\.\d+)\..*?gone \((\.\d+) in both",
     lambda: [*(found := table("smollm2", "separability").query("group == 'first_two'").set_index(["layer", "space"]))
              .leave_one_out_value[[(0, "U"), (0, "V")]], found.leave_one_out_p[(0, "U")],
              found.leave_one_out_value[(30, "U")]]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "pattern", "values"), QUOTES, ids=range(len(QUOTES)))
def test_numbers_in_words(text, pattern, values):
    shown = re.search(pattern, " ".join(text.split()))
    assert shown and is_rounded(list(shown.groups()), values())


# ------------------------------------------------------------------ answers in words, as conditions on the CSV files
STUDIES = ("", "smollm2", "gemma3-270m", "smollm2-docstrings")  # the last one lacks LoRA


def first_choice(docstrings: bool) -> pd.DataFrame:
    """The first choice of prescreen.py on docstring tasks, or on real datasets."""
    return read("", "first_choice").loc[lambda found: found.dataset.str.startswith("docstrings/") == docstrings]


ANSWERS = [
    ("No correlation of SmolLM2 is significant against the same choice among permuted tasks",
     lambda: all((chosen("smollm2", of).p[[*CHOSEN_ON, "lora_gain"]] > 0.05).all() for of in ("", "_paper"))),
    ("`ntps` lies on the claimed side for no outcome", lambda: all(
        row.low < 0 if CLAIMED[row.Index] > 0 else row.high > 0
        for row in rule("smollm2").xs("ntps", level="score").itertuples())),
    ("No score has an interval above 0 for its lead over the best baseline", lambda: not any(
        (read(study, "leads", "score in ['ntps', 'retained', 'ridge_r2', 'logme']").low > 0).any()
        for study in STUDIES)),
    ("PCA keeps more on average in every trained model", lambda: all(
        (of_v["pca"] > of_v["autoregression"])[~of_v.index.str.endswith("-random")].all()
        for of_v in (controls(study).lead_over_random.unstack() for study in STUDIES))),
    ("`retained` of a random V rises more still", lambda: (
        read("smollm2", "after_lora", "model == 'smollm2'", "score").high["retained_lead"] < 0)),
    ("In none of the three studies with LoRA does the interval of a line's lead over the mean lie above 0",
     lambda: not any((read(study, "calibration", "measure == 'lora_gain'").low > 0).any()
                     for study in STUDIES[:3])),
    ("by less than a tenth of their spread", lambda: not any(
        read(s, "seeds", "name in ('ntps', 'ridge_r2', 'probe_accuracy')").share.max() >= 0.1 for s in STUDIES[1:3])),
    ("No score's lead over the better baseline has an interval above 0",
     lambda: (read("", "which_model", "models in ('all', 'gemma3-270m, smollm2')").lead_low <= 0).all()),
    ("on fifteen real datasets, ten of them the paper's: 2,000 training texts (1,000 of `climate_sentiment`), up to "
     "1,000 test texts", lambda: (sizes := table("smollm2", "datasets")).num_test.max() == 1000
     and sizes.groupby("dataset").num_train.max().value_counts().to_dict() == {2000: 14, 1000: 1}),
    ("four trained models of 0.4M to 3.7M parameters and one with random weights", lambda: (
        table("", "models").num_parameters.agg(["size", "min", "max"]).div([1, 1e6, 1e6]).round(1).tolist()
        == [5, 0.4, 3.7])),
    ("ran on nineteen tasks made from docstrings of Python packages; twelve tasks have LoRA and full fine-tuning. "
     "SmolLM2 also ran on twelve of these tasks", lambda: [table(*names).dataset.nunique() for names in (
         ("", "scores"), ("", "training"), ("smollm2-docstrings", "scores"))] == [19, 12, 12]),
    ("Eleven of the fourteen tasks of each gain more than two points", lambda: all(
        read(study, "decision", "measure == 'lora_gain' and score == 'ntps'")[["above", "tasks"]].eq([11, 14]).all(None)
        for study in STUDIES[1:3])),
    ("On docstring tasks six lines predict the gain over the paper's probe", lambda: [
        (read(s, "calibration", "measure == 'lora_gain_paper'").low > 0).sum() for s in STUDIES[:3]] == [6, 0, 0]),
    ("Its choice loses 0.9 points on average and 3.2 at most",
     lambda: first_choice(False).points_lost.agg(["mean", "size", "max"]).round(1).tolist() == [0.9, 14, 3.2]),
    ("recommends a probe on twelve of the real datasets, and the probe beats the bag of words on nine of these",
     lambda: sorted(first_choice(False).query("recommended == 'probe'").over_words > 0) == 3 * [False] + 9 * [True]),
    ("loses 3.5 points on average and 11.2 at most (`raises`)",
     lambda: first_choice(True).points_lost.agg(["mean", "size", "max"]).round(1).tolist() == [3.5, 12, 11.2]),
    ("On ten of the docstring tasks it recommends the bag of words, which is better than the probe on all of them",
     lambda: (first_choice(True).query("recommended == 'bag of words'").over_words < 0).tolist() == [True] * 10),
    ("By our rule no score is of use here", lambda: not any(
        read(s, "layer_choice", index="chosen_by").drop("best on test rows")[["over_middle_low", "over_others_low"]]
        .gt(0).all(axis=1).any() for s in STUDIES[1:3])),
    ("six have full fine-tuning", lambda: [table(study, "training").query("method == 'full_finetuning'").groupby(
        "model").dataset.nunique()[study] for study in ("smollm2", "gemma3-270m")] == [6, 6]),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "holds"), ANSWERS, ids=[answer[0][:40] for answer in ANSWERS])
def test_answers_hold(sentence, holds):
    assert sentence in " ".join(f"{FINDINGS} {SCORES}".split()) and holds()


# ------------------------------------------------------------------ page.py
def test_pages_are_what_the_csv_files_say(monkeypatch, capsys):
    assert run_in_process(monkeypatch, "fig_plot/findings/page.py", "--check") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "docs/scores.md"


def test_a_stale_table_is_found_and_mended(monkeypatch, tmp_path):
    start = "<!-- table: controls of smollm2 -->\n"
    stale = f"words\n\n{start}| 1 |\n<!-- end -->\n\nmore words\n"
    (tmp_path / "page.md").write_text(stale)
    monkeypatch.setattr(page, "PAGES", (Path("page.md"),))
    monkeypatch.setattr(page, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"page\.md differs from the CSV files"):
        page.main(page.Config(check=True))
    assert (tmp_path / "page.md").read_text() == stale
    page.main(page.Config())
    mended = (tmp_path / "page.md").read_text()
    assert mended.startswith(f"words\n\n{start}| model |") and mended.endswith("<!-- end -->\n\nmore words\n")
    (tmp_path / "page.md").write_text("<!-- table: colours of smollm2 -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="asks for the table 'colours'"):
        page.main(page.Config())


def test_an_interval_over_few_tasks_is_not_shown_and_a_missing_value_leaves_its_cell_empty(tmp_path):
    few = read("smollm2", "layer_choice").assign(tasks=7)
    few.loc[few.chosen_by == "ridge_r2", ["lead", "low", "high"]] = None
    few.to_csv(tmp_path / "findings_layer_choice.csv", index=False)
    lines = page.markdown({"one": page.layer_choice(tmp_path)}).splitlines()
    rows = {line.split(" | ")[0]: [cell.strip(" |") for cell in line.split(" | ")] for line in lines}
    assert rows["| ridge R2"][2] == "" and re.fullmatch(r"[+-]\d\.\d", rows["| LogME"][2])
