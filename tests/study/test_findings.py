"""fig_plot/tables.py and fig_plot/findings/__main__.py on made-up studies with known answers."""

import gzip

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from fig_plot import tables
from fig_plot.findings import __main__ as findings
from fig_plot.findings.correlations import Draws
from fig_plot.findings.procedure import STEPS, twin_rows
from fig_plot.findings.questions import (
    decision_rows,
    layer_choice_rows,
    random_weights_rows,
    seed_rows,
)
from tests.conftest import run_command, run_in_process
from utils.script import UserError

pytestmark = pytest.mark.slow

MODELS, TASKS = ("small-one-random", "small-one", "large-one", "huge-one"), [f"task{i:02d}" for i in range(14)]
FRACTIONS, LAYERS = (0.25, 0.5, 0.75), (0, 1, 2)
NAMES = ("ntps", "ntps_label", "ntps_whitened", "retained")


def write_study(folder, seed: int = 0, relation: float = 1.0) -> pd.DataFrame:
    """CSV files as collect.py writes them, and the truth they were made from, one row per model and task.

    `ntps` is `relation` x probe accuracy + noise (no noise at 1); `retained` is noise; LoRA gains 0.3 x headroom.
    Across models NTPS falls with accuracy: a model's NTPS is shifted down by twice the upward shift of its accuracy.
    """
    random = np.random.default_rng(seed)
    easy = random.permutation(np.linspace(0.3, 0.9, len(TASKS)))
    rows, layers, probes, training = [], [], [], []
    for shift, model in zip((-0.05, 0.0, 0.02, 0.04), MODELS, strict=True):
        for task, base in zip(TASKS, easy, strict=True):
            accuracy = base + shift
            value = relation * base + (1 - relation) * random.uniform(0.3, 0.9) - 2 * shift
            scores = {name: random.uniform() for name in NAMES} | {"ntps": value}
            keys = {"model": model, "dataset": task, "seed": 0, "split": "train", "center": False}
            for order, subspace, lead in (
                *(("largest", "autoregression", 0.0), ("smallest", "autoregression", -0.5)),
                *(("largest", "pca", 0.1), ("largest", "random", -0.2)),
            ):
                row = {**keys, "eigenvectors": order, "subspace": subspace, "layer": 2, "probe_mse": 9.0}
                row["num_classes"] = 2
                row |= {name: score + lead for name, score in scores.items()}
                row |= {f"{name}_{key}": 3.0 for name in NAMES[1:] for key in ("null_mean", "null_std", "z")}
                rows.append(row)
            for layer in LAYERS:
                probes.append({"model": model, "dataset": task, "seed": 0, "layer": layer, "train_accuracy": 1.0,
                               "test_accuracy": accuracy if layer == 2 else 0.0, "test_mse_over_variance": 1 - accuracy,
                               "train_mse_over_variance": 0.0})  # fmt: skip
                for fraction in FRACTIONS:
                    here = value if (layer, fraction) == (1, 0.5) else random.uniform()
                    layers.append({**keys, "eigenvectors": "largest", "layer": layer, "fraction": fraction,
                                   **dict.fromkeys(NAMES, here), "chance": fraction})  # fmt: skip
            for method, result in (("linear_training", accuracy - 0.1), ("lora", accuracy + 0.3 * (1 - accuracy))):
                training.append({"model": model, "dataset": task, "seed": 0, "method": method,
                                 "test_accuracy": result})  # fmt: skip
    datasets = [
        {"dataset": task, "seed": 0, "num_classes": 2, "majority_accuracy": 0.25, "bag_of_words_accuracy": 0.5}
        for task in TASKS
    ]
    sizes = [{"model": model, "num_parameters": 10**i, "held_out_loss": 4.0 - i} for i, model in enumerate(MODELS)]
    for name, table in {"scores": rows, "layers": layers, "probes": probes, "training": training,
                        "datasets": datasets, "models": sizes}.items():  # fmt: skip
        pd.DataFrame(table).to_csv(tables.table_path(name, folder), index=False)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The tables of a made-up study in which NTPS ranks tasks perfectly, by the command a user types."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder)
    done = run_command(
        "-m", "fig_plot.findings", "--tables_dir", folder, "--num_draws", "200", "--num_permutations", "200"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(folder)
    return {
        path.stem.removeprefix("findings_"): pd.read_csv(path, keep_default_na=False, na_values=[""])
        for path in folder.glob("findings_*.csv")
    }


def correlation(table, direction, score, measure, kind="spearman"):
    rows = table[(table.direction == direction) & (table.score == score) & (table.measure == measure)]
    return rows[rows.correlation == kind].iloc[0]


def test_a_perfect_score_is_called_perfect_and_noise_is_not(study):
    table = study["correlations"]
    for kind in ("spearman", "kendall", "weighted_tau"):
        assert correlation(table, "across tasks", "ntps", "probe_accuracy", kind).value == pytest.approx(1)
    assert correlation(table, "across tasks", "ntps", "lora_gain").value == pytest.approx(-1)  # gain = .3 headroom
    assert correlation(table, "across tasks", "headroom", "lora_gain").value == pytest.approx(1)
    assert correlation(table, "across tasks", "ntps", "probe_mse").value == pytest.approx(-1)
    noise = correlation(table, "across tasks", "retained", "probe_accuracy")
    assert noise.low < 0 < noise.high
    # across models the planted order is the other way round, and the model with random weights takes no part
    across = correlation(table, "across models", "ntps", "probe_accuracy")
    assert across.value == pytest.approx(-1) and across.members == 3 and across.groups == len(TASKS)


def test_selection_finds_the_planted_configuration_and_noise_has_no_small_p(study):
    rows = study["selection"].query("measure == 'probe_accuracy' and eigenvectors == 'largest' and score == 'ntps'")
    assert set(rows.model) == set(MODELS[1:])
    assert (rows.best.round(6) == 1).all() and (rows.layer == 1).all() and (rows.fraction == 0.5).all()
    assert (rows.p < 0.02).all() and (rows.leave_one_out > 0.95).all() and (rows.null_mean < 0.7).all()


def test_controls_give_the_planted_leads(study):
    rows = study["controls"].query("model == 'small-one' and score == 'retained'").set_index("v")
    assert rows.loc["autoregression", "lead_over_random"] == pytest.approx(0.2)
    assert rows.loc["pca", "lead_over_random"] == pytest.approx(0.3)
    assert rows.loc["smallest", "lead_over_random"] == pytest.approx(-0.3)
    assert rows.loc["autoregression", "tasks_above_2_z"] == len(TASKS)
    assert "small-one-random" in set(study["controls"].model)


def test_random_weights_are_compared_on_the_tasks_of_both():
    random = np.random.default_rng(0)
    of_twin = pd.DataFrame({"model": "tiny-random", "dataset": TASKS[:9], "ntps": random.uniform(size=9)})
    of_twin = of_twin.assign(retained=random.uniform(size=9), full_gain=np.nan)
    trained = of_twin.assign(model="tiny", ntps=of_twin.ntps + 0.1, retained=0.8 * random.permutation(of_twin.retained))
    further = pd.DataFrame({"model": "tiny", "dataset": TASKS[9:], "ntps": 5.0, "retained": 5.0, "full_gain": 1.0})
    cells = pd.concat([of_twin, trained, further], ignore_index=True)
    after = cells.assign(ntps_before=cells.ntps - 0.2, retained_before=cells.retained)
    after.loc[after.model == "tiny-random", "ntps_before"] -= 0.3
    other_seed = after.assign(ntps_before=after.ntps_before + 0.1)  # changes are averaged over seeds
    rows = {row["name"]: row for row in random_weights_rows(cells, pd.concat([after, other_seed]), Draws(50, 0))}
    assert set(rows) == {"ntps", "retained", "ntps_change", "retained_change"}
    change = rows["ntps_change"]
    assert [change[name] for name in ("trained", "random_weights", "lead")] == pytest.approx([0.15, 0.45, -0.3])
    ntps, retained = rows["ntps"], rows["retained"]
    assert [ntps["lead"], ntps["low"], ntps["high"], ntps["spearman"]] == pytest.approx([0.1, 0.1, 0.1, 1.0])
    assert (ntps["model"], ntps["tasks"], ntps["random_weights"]) == ("tiny", 9, pytest.approx(of_twin.ntps.mean()))
    expected = spearmanr(trained.retained, of_twin.retained).statistic
    assert retained["spearman"] == pytest.approx(expected) and abs(expected) < 0.9
    assert retained["lead"] == pytest.approx(-0.2 * of_twin.retained.mean())


DAMAGES = {
    "empty": (lambda content: b"", "it has been cut off"),
    "not text": (lambda content: b"\xff\xfe" + content, "can't decode byte 0xff"),
    "foreign": (lambda content: b"a,b\n1,2\n", "it has no column model"),
    "header alone": (lambda content: content.splitlines(keepends=True)[0], "it has no rows"),
    "word": (lambda content: content.replace(b",0.", b",about 0.", 1), "is not of numbers"),
    "cut within a cell": (lambda content: content[:-3], "it has been cut off"),
    "short row": (lambda content: content[: content.rindex(b",")] + b"\n", "its rows differ in length"),
    "long row": (lambda content: content[:-1] + b",1,2\n", "its rows differ in length"),
    "open quotation": (lambda content: content[: content.rindex(b",") + 1] + b'"1\n', "EOF inside string"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_named_with_the_command_that_makes_it_again(damage, tmp_path):
    write_study(tmp_path)
    change, why = DAMAGES[damage]
    for name, pack, unpack in (("scores", bytes, bytes), ("layers", gzip.compress, gzip.decompress)):
        path = tables.table_path(name, tmp_path)
        path.write_bytes(pack(change(unpack(path.read_bytes()))))
        with pytest.raises(
            UserError, match=rf"is no complete table \(.*({why}).*again: python -m fig_plot\.collect$"
        ) as of:
            tables.read_table(name, tmp_path)
        assert str(of.value).startswith(str(path)) and "\n" not in str(of.value)
    (tmp_path / "findings_leads.csv").write_text("score,value\nntps,0.1\nret")
    with pytest.raises(UserError, match=r"findings_leads.csv is no complete table .*: python -m fig_plot.findings$"):
        tables.read_table("findings_leads", tmp_path)


def test_the_procedure_by_the_scores_of_random_weights(tmp_path):
    """Both relations are planted at layer 1 and fraction .5; the twin of `small-one` orders the tasks the other way."""
    write_study(tmp_path)
    layers = findings.train_layers(tmp_path)
    of_twin = layers["model"] == "small-one-random"
    layers.loc[of_twin, "ntps"] = 1 - layers.loc[of_twin, "ntps"]
    cells, probes = tables.load_seeds(tmp_path), tables.read_table("probes", tmp_path)
    rows = pd.DataFrame(twin_rows(cells, layers, probes, Draws(50, 0))).set_index(["weights", "measure", "step"])
    planted = (slice(None), "lora_gain", "layer and K chosen")
    assert rows.loc[("trained", *planted[1:]), ["spearman", "layer", "fraction"]].tolist() == [
        pytest.approx(-1),
        1,
        0.5,
    ]
    assert rows.loc[("random", *planted[1:]), "spearman"] > -0.9 and (rows.model == "small-one").all()
    kept = pd.concat([layers[~of_twin], layers[of_twin & layers["dataset"].isin(TASKS[:6])]])
    assert (pd.DataFrame(twin_rows(cells, kept, probes, Draws(50, 0))).tasks == 6).all()


def test_cells_take_the_last_layer_and_differences_of_the_same_seed(tmp_path):
    """A gain compares runs of one seed at the last layer; a regression has no number of classes."""
    write_study(tmp_path)
    scores = pd.read_csv(tmp_path / "scores.csv")
    scores.loc[scores.dataset == "task03", "num_classes"] = 0
    scores.to_csv(tmp_path / "scores.csv", index=False)
    training = pd.read_csv(tmp_path / "training.csv")
    other = training[(training.method == "lora") & (training.model == "small-one")].assign(seed=1, test_accuracy=0.0)
    pd.concat([training, other]).to_csv(tmp_path / "training.csv", index=False)
    cells = tables.load_cells(tmp_path).set_index(["model", "dataset"])
    assert len(cells) == len(MODELS) * len(TASKS)
    assert (cells.probe_accuracy > 0.2).all()  # layers 0 and 1 have 0
    expected = 0.3 * (1 - cells.probe_accuracy)
    # a LoRA run without a probe of its seed gives no gain, rather than one over another seed's probe
    assert np.allclose(cells.lora_gain, expected)
    assert (cells.ntps_pca - cells.ntps).round(9).eq(0.1).all()
    assert cells.probe_mse.max() < 1  # the probe on test, not that of the moments
    classes = cells.num_classes.unstack()
    assert classes["task03"].isna().all() and (classes["task04"] == 2).all()


def test_auc_of_a_gain_compares_tasks_within_a_model():
    """Within each model a higher score goes with a smaller gain; the model with higher scores gains more."""
    random = np.random.default_rng(0)
    rows = []
    for model, level in (("low", 0.0), ("high", 1.0), ("never", 5.0)):
        for task, place in zip(TASKS, random.permutation(len(TASKS)), strict=True):
            gain = 0.0 if model == "never" else 0.03 * ((place < 4) + (place < 10) * level)
            rows.append({"model": model, "dataset": task, "ntps": level + place / 100, "lora_gain": gain})
    [row] = decision_rows(pd.DataFrame(rows), Draws(40, 0))
    assert row["auc"] == 0 and row["high"] == 0 and row["above"] == 14


def test_share_of_the_spread_between_seeds_has_an_interval_that_covers_it():
    random, covered = np.random.default_rng(1), []
    tasks, between, over = np.arange(8), 0.5, 2.0
    for _ in range(300):
        level = random.normal(size=8) * np.sqrt(over**2 - between**2 / 2)  # of the means over two seeds: `over`
        table = pd.concat(
            pd.DataFrame({"model": "m", "dataset": tasks, "seed": seed,
                          "ntps": level + between * random.normal(size=8)})
            for seed in (0, 1)
        )  # fmt: skip
        [row] = seed_rows(table)
        covered.append(row["low"] < between / over < row["high"])
    assert 0.91 < np.mean(covered) < 0.985


def test_the_papers_own_datasets_are_judged_alone_too(tmp_path, monkeypatch):
    """Seven of fourteen are the paper's; on these the planted relation is reversed."""
    write_study(tmp_path)
    own = TASKS[::2]
    scores, layers = (pd.read_csv(tables.table_path(name, tmp_path)) for name in ("scores", "layers"))
    for table in (scores, layers):
        table.loc[table.dataset.isin(own), "ntps"] *= -1
    scores.to_csv(tmp_path / "scores.csv", index=False)
    layers.to_csv(tables.table_path("layers", tmp_path), index=False)
    assert "like_for_like_paper" not in findings.study_tables(tmp_path, Draws(40, 0))
    monkeypatch.setattr(findings, "PAPER_KEYS", (*own, "elsewhere"))
    made = findings.study_tables(tmp_path, Draws(40, 0))
    rule = made["correlations_paper"]
    assert correlation(rule, "across tasks", "ntps", "probe_accuracy").value == pytest.approx(-1)
    assert set(rule[rule.direction == "across tasks"].members) == {7}
    chosen = made["like_for_like_paper"].query("measure == 'lora_gain' and model == 'mean'").set_index("step")
    assert (chosen.tasks == 7).all() and chosen.spearman[STEPS[0]] > -1
    assert made["like_for_like"].query("measure == 'lora_gain' and model == 'mean'").tasks.eq(14).all()
    assert chosen.low[list(STEPS[:2])].isna().all() and chosen.low.notna()[STEPS[2]]
    assert 0 < chosen.p[STEPS[0]] <= 1


def test_missing_tables_name_the_command(tmp_path, monkeypatch):
    message = run_in_process(monkeypatch, "fig_plot/findings/__main__.py", "--tables_dir", tmp_path)
    assert "python -m fig_plot.collect" in message


def test_layer_that_a_score_chooses_is_judged_by_its_probe_on_test_rows():
    """`retained` finds the best layer of every task, `ntps` the worst; seeds of a task count once."""
    random = np.random.default_rng(2)
    accuracy = random.random((4, 5))  # tasks, layers
    rows = [
        {"model": "one", "dataset": f"task{task}", "seed": seed, "layer": layer, "test_accuracy": accuracy[task, layer],
         "retained": accuracy[task, layer], "ntps": -accuracy[task, layer], "ridge_r2": float(layer)}
        for task in range(4) for layer in range(5) for seed in range(1 + (task == 0))
    ]  # fmt: skip
    found = pd.DataFrame(layer_choice_rows(pd.DataFrame(rows), Draws(100))).set_index("chosen_by")
    expected = {"retained": accuracy.max(1), "best on test rows": accuracy.max(1), "ntps": accuracy.min(1),
                "ridge_r2": accuracy[:, -1], "last layer": accuracy[:, -1], "middle layer": accuracy[:, 2],
                "any layer": accuracy.mean(1)}  # fmt: skip
    for name, values in expected.items():
        assert found.accuracy[name] == pytest.approx(values.mean())
        assert found.lead[name] == pytest.approx((values - accuracy[:, -1]).mean())
    assert found.low["retained"] >= 0 >= found.high["ntps"] and set(found.tasks) == {4}
    on_others = [accuracy[i, np.delete(accuracy, i, 0).mean(0).argmax()] for i in range(4)]
    assert found.accuracy["best on the others"] == pytest.approx(np.mean(on_others))
    for lead, other in (("over_middle", accuracy[:, 2]), ("over_others", on_others)):
        assert found[lead]["retained"] == pytest.approx((accuracy.max(1) - other).mean())
        assert found[f"{lead}_low"]["retained"] <= found[lead]["retained"] <= found[f"{lead}_high"]["retained"]
