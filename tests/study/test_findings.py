"""fig_plot/tables.py on damaged tables, and statistics of fig_plot/findings on made-up studies with known answers."""

import gzip
import shutil

import numpy as np
import pandas as pd
import pytest

from fig_plot import tables
from fig_plot.findings.correlations import Draws
from fig_plot.findings.questions import correlation_rows, layer_choice_rows
from tests.conftest import run_in_process
from utils.script import UserError


def test_a_perfect_score_is_called_perfect_and_noise_is_not():
    """Within a model `ntps` rises with accuracy and falls with the gain; across models it falls with accuracy."""
    random = np.random.default_rng(0)
    easy = random.permutation(np.linspace(0.3, 0.9, 14))
    cells = pd.concat(
        pd.DataFrame({"model": model, "dataset": range(14), "ntps": easy - 2 * shift, "retained": random.random(14),
                      "probe_accuracy": easy + shift, "headroom": 1 - easy - shift, "lora_gain": 1 - easy - shift})
        for model, shift in (("small", 0.0), ("large", 0.02), ("huge", 0.04))
    )  # fmt: skip
    table = pd.DataFrame(correlation_rows(cells, Draws(200))).set_index(["direction", "score", "measure"])
    tasks, models = table.loc["across tasks"], table.loc["across models"]
    assert tasks.value[("ntps", "probe_accuracy")] == pytest.approx(1)
    assert tasks.value[("ntps", "lora_gain")] == pytest.approx(-1)
    assert tasks.value[("headroom", "lora_gain")] == pytest.approx(1)
    assert tasks.low[("retained", "probe_accuracy")] < 0 < tasks.high[("retained", "probe_accuracy")]
    across = models.loc[("ntps", "probe_accuracy")]
    assert across.value == pytest.approx(-1) and across.members == 3 and across.groups == 14


DAMAGES = {
    "empty": (lambda content: b"", "it has been cut off"),
    "not text": (lambda content: b"\xff\xfe" + content, "can't decode byte 0xff"),
    "foreign": (lambda content: b"a,b\n1,2\n", "lacks one of the columns model, dataset, seed"),
    "word": (lambda content: content.replace(b",0.", b",about 0.", 1), "or has words in ntps"),
    "cut within a cell": (lambda content: content[:-2], "it has been cut off"),
    "open quotation": (lambda content: content[: content.rindex(b",") + 1] + b'"1\n', "EOF inside string"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["scores", "layers"])
def test_a_damaged_table_is_named_with_the_command_that_makes_it_again(name, damage, tmp_path):
    change, why = DAMAGES[damage]
    path = tables.table_path(name, tmp_path)
    content = change(b"model,dataset,seed,ntps,layer\na,b,0,0.5,10\na,c,0,0.25,12\n")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(UserError, match=rf"table \(.*({why}).*again: python -m fig_plot\.collect$") as of:
        tables.read_table(name, tmp_path)
    assert str(of.value).startswith(f"{path} is no complete") and "\n" not in str(of.value)


def test_a_damaged_or_missing_table_names_the_command_that_makes_it(tmp_path, monkeypatch):
    (tmp_path / "findings_leads.csv").write_text("score,value\nntps,0.1\nret")
    with pytest.raises(UserError, match=r"findings_leads.csv is no complete table .*: python -m fig_plot.findings$"):
        tables.read_table("findings_leads", tmp_path)
    message = run_in_process(monkeypatch, "fig_plot/findings/__main__.py", "--tables_dir", tmp_path)
    assert "python -m fig_plot.collect" in message
    with pytest.raises(UserError, match=r"probes.csv. Run: python linear_sklearn.py, then python -m fig_plot.collect$"):
        tables.read_table("probes", tmp_path)


@pytest.mark.parametrize("dataset", ["emotion", "toxigen"])  # classes, a regression
def test_findings_of_a_single_dataset(dataset, tmp_path, monkeypatch):
    for name in ("scores", "layers", "features", "probes", "datasets"):
        table = tables.read_table(name, tables.DATA_DIR / "smollm2").query("dataset == @dataset and seed == 0")
        tables.save_csv(tables.table_path(name, tmp_path), table.dropna(axis=1, how="all"))
    shutil.copy(tables.DATA_DIR / "smollm2" / "models.csv", tmp_path)
    options = ("--tables_dir", tmp_path, "--num_draws", "20", "--num_permutations", "20")
    assert run_in_process(monkeypatch, "fig_plot/findings/__main__.py", *options) == 0


def test_layer_that_a_score_chooses_is_judged_by_its_probe_on_test_rows():
    """`retained` finds the best layer of every task, `ntps` the worst; ridge R2 has the first of two seeds alone."""
    random = np.random.default_rng(2)
    accuracy = random.random((4, 5))  # tasks, layers
    rows = [
        {"model": "one", "dataset": f"task{task}", "seed": seed, "layer": layer,
         "test_accuracy": accuracy[task, layer] + 0.1 * (2 * seed - 1) * (task == 0),
         "retained": accuracy[task, layer], "ntps": -accuracy[task, layer], "ridge_r2": None if seed else float(layer)}
        for task in range(4) for layer in range(5) for seed in range(1 + (task == 0))
    ]  # fmt: skip
    found = pd.DataFrame(layer_choice_rows(pd.DataFrame(rows), Draws(100))).set_index("chosen_by")
    expected = {"retained": accuracy.max(1), "best on test rows": accuracy.max(1), "ntps": accuracy.min(1),
                "ridge_r2": accuracy[:, -1], "last layer": accuracy[:, -1], "middle layer": accuracy[:, 2],
                "any layer": accuracy.mean(1)}  # fmt: skip
    for name, values in expected.items():
        assert found.accuracy[name] == pytest.approx(values.mean() - 0.1 / 4 * (name == "ridge_r2"))
        assert found.lead[name] == pytest.approx((values - accuracy[:, -1]).mean())
    assert found.low["retained"] >= 0 >= found.high["ntps"] and set(found.tasks) == {4}
    on_others = [accuracy[i, np.delete(accuracy, i, 0).mean(0).argmax()] for i in range(4)]
    assert found.accuracy["best on the others"] == pytest.approx(np.mean(on_others))
    for lead, other in (("over_middle", accuracy[:, 2]), ("over_others", on_others)):
        assert found[lead]["retained"] == pytest.approx((accuracy.max(1) - other).mean())
        assert found[f"{lead}_low"]["retained"] <= found[lead]["retained"] <= found[f"{lead}_high"]["retained"]
