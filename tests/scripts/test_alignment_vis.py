"""alignment_vis.py: directions equal scipy's, coordinates transformers', scores the formulas; its command line."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.optimize
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import alignment_vis
import cache
from tests.conftest import configure, make_texts, run_command, write_rows
from utils import separability
from utils.pictures import plot_alignment
from utils.results import read_identity
from utils.script import UserError
from utils.settings import all_settings, with_values

pytestmark = pytest.mark.slow

GROUPS = ("colour=red,green,house", "size=small,large,engine", "rest=the,of")
GROUPED = ["red", "green", "house", "small", "large", "engine", "the", "of"]
COMPONENTS = ["component_1", "component_2"]


@pytest.fixture(scope="module")
def made(model_dirs, rows_path, tmp_path_factory):
    """Folder with the moments of the train split; tests work on copies."""
    results_dir = tmp_path_factory.mktemp("made")
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}
    cache.main(configure(cache, **names, results_dir=results_dir))
    return configure(alignment_vis, **names, results_dir=results_dir, words=GROUPS, num_shuffles=2)


@pytest.fixture
def config(made, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment_vis, "save_figure", lambda *_: None)
    shutil.copytree(made.run.results_dir, tmp_path / "results")
    return with_values(made, results_dir=tmp_path / "results")


def dense_solutions(config, layer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All eigenvalues and eigenvectors of both problems by scipy, largest first, from the matrices as they are."""
    [path] = config.run.results_dir.glob("moments/*/*/train.safetensors")
    found = {name.removeprefix(f"layer.{layer}."): tensor.numpy() for name, tensor in load_file(path).items()}
    b, m = found["pooled_label_cross_moment"], found["pooled_second_moment"]
    c0, c1 = found["prefix_second_moment"], found["prefix_next_cross_moment"]
    if config.center:
        metadata = read_identity(path)
        pairs = metadata["num_pairs"] / metadata["num_samples"]
        mean, prefix = found["pooled_mean"], found["prefix_mean"]
        b, m = b - np.outer(mean, found["label_mean"]), m - np.outer(mean, mean)
        c0, c1 = c0 - np.outer(prefix, prefix) / pairs, c1 - np.outer(prefix, found["next_mean"]) / pairs
    solved = {"U": scipy.linalg.eigh(b @ b.T, m), "V": scipy.linalg.eigh(c1 @ c1.T, c0)}
    return {subspace: (values[::-1], vectors[:, ::-1]) for subspace, (values, vectors) in solved.items()}


def states_by_transformers(folder, layer) -> np.ndarray:
    """Mean over its tokens of each word's hidden state, word by word."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        outputs = [model(**tokenizer(word, return_tensors="pt"), output_hidden_states=True) for word in GROUPED]
    return np.stack([output.hidden_states[layer][0].double().mean(0).numpy() for output in outputs])


# ------------------------------------------------------------------ coordinates
@pytest.mark.parametrize(("layer", "center"), [(1, False), (2, True)])
def test_coordinates_are_states_times_scipy_s_top_eigenvectors(config, layer, center):
    config = with_values(config, layer=layer, center=center)
    alignment_vis.main(config)
    [path] = config.run.results_dir.glob("alignment/*/rows.*.json")
    result, table = json.loads(path.read_text()), pd.read_csv(path.with_suffix(".csv"))
    states = states_by_transformers(config.model.model_name, layer)
    assert result["num_samples"] == 168 and list(result["num_tokens"]) == GROUPED
    for subspace, (values, vectors) in dense_solutions(config, layer).items():
        rows = table[table.subspace == subspace]
        assert list(rows.word) == GROUPED and list(rows.category) == ["colour"] * 3 + ["size"] * 3 + ["rest"] * 2
        expected = states @ vectors[:, :2]
        gap = expected[:3].mean(0) - expected[3:6].mean(0)
        expected *= np.where(gap < 0, -1, 1)  # the solver's signs do not count
        np.testing.assert_allclose(rows[COMPONENTS], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        described = result["subspaces"][subspace]
        np.testing.assert_allclose(described["eigenvalues"], values[:2], rtol=1e-5)  # float32 products
        assert values[0] > values[1] > values[2]
        for group, num in (("first_two", 6), ("all", 8)):
            x, labels = rows[COMPONENTS].to_numpy()[:num], np.array([0, 0, 0, 1, 1, 1, 2, 2])[:num]
            value = silhouette_by_hand((x - x.mean(0)) / x.std(0), labels)
            assert described["separability"][group]["silhouette"]["value"] == pytest.approx(value)


# ------------------------------------------------------------------ separability
def logistic_weights(x, is_first) -> np.ndarray:
    """Weights and intercept of log-loss + |w|^2 / 2, minimised by scipy in its written-out form."""
    sign = np.where(is_first, 1, -1)

    def loss(w):
        return np.logaddexp(0, -sign * (x @ w[:-1] + w[-1])).sum() + w[:-1] @ w[:-1] / 2

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1] + 1), method="BFGS", options={"gtol": 1e-7}).x


def silhouette_by_hand(x, labels) -> float:
    """Mean over points of (b - a) / max(a, b): distances to the nearest other category and to the own one."""
    scores = []
    for i, own in enumerate(labels):
        away = np.linalg.norm(x - x[i], axis=1)
        a = away[(labels == own) & (np.arange(len(x)) != i)].mean()
        b = min(away[labels == other].mean() for other in set(labels) - {own})
        scores.append((b - a) / max(a, b))
    return float(np.mean(scores))


def leave_one_out_by_hand(x, labels) -> float:
    """Share of points of two categories that the line through the others puts on the right side."""
    right = []
    for i in range(len(x)):
        w = logistic_weights(np.delete(x, i, 0), np.delete(labels, i) == 0)
        right.append((x[i] @ w[:-1] + w[-1] > 0) == (labels[i] == 0))
    return float(np.mean(right))


def test_scores_equal_their_formulas_also_for_shuffled_labels_and_units_do_not_matter():
    random, labels = np.random.default_rng(1), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    x = random.normal(size=(9, 3)) + labels[:, None]
    scores = separability.separability(x, labels, num_shuffles=8, seed=4)
    random, scaled = np.random.default_rng(4), (x - x.mean(0)) / x.std(0)
    shuffled = [random.permutation(labels) for _ in range(8)]
    for name, by_hand in (("silhouette", silhouette_by_hand), ("leave_one_out", leave_one_out_by_hand)):
        value, drawn = by_hand(scaled, labels), np.array([by_hand(scaled, drawn) for drawn in shuffled])
        p = (1 + (drawn >= value - 1e-9).sum()) / 9
        assert scores[name] == pytest.approx({"value": value, "shuffled": drawn.mean(), "p": p})
    assert 0.3 < scores["leave_one_out"]["value"] < 1 and scores["silhouette"]["p"] < 1
    stretched = separability.separability(x * [1e-3, 50, 2] + [0, 3000, 7], labels, num_shuffles=8, seed=4)
    assert stretched == {name: pytest.approx(score) for name, score in scores.items()}


def test_line_is_that_of_logistic_regression():
    random, is_first = np.random.default_rng(2), np.repeat([True, False], [5, 4])
    x = random.normal(size=(9, 2)) * [0.01, 20] + np.where(is_first, 0.01, -0.01)[:, None] + [3, -7]
    weights, intercept = separability.separating_line(x, is_first)
    w = logistic_weights((x - x.mean(0)) / x.std(0), is_first)
    expected = np.append(w[:2] / x.std(0), w[2] - w[:2] / x.std(0) @ x.mean(0))
    np.testing.assert_allclose([*weights, intercept], expected, rtol=1e-3)


# ------------------------------------------------------------------ the picture
def alignment_table(groups: dict[str, int]) -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = [
        (subspace, category, f"{category}{i}", *at)
        for subspace, scale in (("U", 5), ("V", 0.01))
        for category, num in groups.items()
        for i, at in enumerate(random.normal(size=(num, 2)) * scale)
    ]
    return pd.DataFrame(rows, columns=["subspace", "category", "word", *COMPONENTS])


def test_picture_shows_every_word_and_the_line():
    """Names are no mathematics and none is hidden: matplotlib hides labels that start with an underscore."""
    table = alignment_table({"_joy $x_$": 3, "sad": 2, "be": 2})
    table.loc[table.word == "sad0", "word"] = "_cost$"
    figure = plot_alignment(table, notes={"U": "$1$", "V": "$_$"})
    figure.canvas.draw()  # a formula that matplotlib cannot parse raises here
    titles = ["Perception space, U'x\n$1$", "Autoregression space, V'x\n$_$"]
    assert [panel.get_title() for panel in figure.axes] == titles
    for panel, subspace in zip(figure.axes, "UV", strict=True):
        rows = table[table.subspace == subspace]
        points = [line.get_xydata()[0] for line in panel.lines if len(line.get_xydata()) == 1]
        np.testing.assert_allclose(points, rows[COMPONENTS])
        weights, intercept = separability.separating_line(rows[COMPONENTS].to_numpy()[:5], np.arange(5) < 3)
        [dashed] = [drawn for drawn in panel.lines if drawn.get_linestyle() == "--"]
        for point in (dashed.get_xy1(), dashed.get_xy2()):
            assert weights @ point == pytest.approx(-intercept, abs=1e-9 * (np.abs(weights) @ np.abs(point) + 1))
    shown = figure.legends[0].get_texts()
    assert [text.get_text() for text in shown] == [
        *("_joy $x_$", "_joy $x_$0", "_joy $x_$1", "_joy $x_$2", "sad", "_cost$", "sad1", "be", "be0", "be1"),
        "_joy $x_$ / sad",
    ]


def test_many_words_have_a_style_each_and_fit():
    figure = plot_alignment(alignment_table({name: 5 for name in "abcdefgh"}))
    styles = [(line.get_marker(), tuple(np.ravel(line.get_color()))) for line in figure.axes[0].lines]
    assert len({style for style in styles if style[0] not in ("None", None)}) == 40
    figure.canvas.draw()
    box, seen = figure.bbox, figure.legends[0].get_window_extent()
    assert seen.y0 >= box.y0 and seen.y1 <= box.y1 and seen.x1 <= box.x1


# ------------------------------------------------------------------ command line and mistakes
def test_command_line_writes_table_and_picture(config):
    names = ("model_name", "dataset_name", "results_dir", "num_shuffles")
    options = [word for name in names for word in (f"--{name}", str(all_settings(config)[name]))]
    run = run_command("alignment_vis.py", *options, "--layer", "-1", "--words", *GROUPS)
    [path] = config.run.results_dir.glob("alignment/*/rows.layer2.json")
    assert run.returncode == 0 and run.stdout.strip().splitlines()[-1] == str(path), run.stderr
    assert "leave-one-out" in run.stdout and "colour / size" in run.stdout
    files = [f"rows.layer2.{suffix}" for suffix in ("csv", "json", "pdf", "png")]
    assert sorted(file.name for file in path.parent.iterdir()) == files


@pytest.mark.parametrize("second", ["small,large", "b=small,,large", "a=small,large", "b=small", "b=small, red"])
def test_bad_words_are_refused(second):
    words = ("a=red,green", second)
    with pytest.raises(UserError, match=f"category and word once.*not {' '.join(words)}"):
        alignment_vis.parse_words(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "no layer 3.* 0 to 2, or -3 to -1"),
        ({"num_components": 4}, "perception .*fewer than 4 positive eigenvalues.*smaller --num_components"),
        ({"num_components": 3, "center": True}, "fewer than 3 .*no --center"),
    ],
)
def test_impossible_requests_end_in_one_sentence(made, options, message):
    with pytest.raises(UserError, match=message):
        alignment_vis.main(with_values(made, **options))
    assert not list(made.run.results_dir.glob("alignment/*/*"))


def test_tied_axes_are_refused(model_dirs, tmp_path):
    """Classes of equal size and fewer texts than dimensions: any rotation of the axes is a solution."""
    rows = [{"text": f"{text} {i}", "label": "abc"[i % 3]} for i, text in enumerate(make_texts(24))]
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(write_rows(tmp_path / "rows.jsonl", rows))}
    names |= {"results_dir": tmp_path, "split": "all"}
    cache.main(configure(cache, **names))
    with pytest.raises(UserError, match=r"perception problem .* at layer 2 .*or equal ones"):
        alignment_vis.main(configure(alignment_vis, **names, layer=2, words=GROUPS))
