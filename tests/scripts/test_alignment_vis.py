"""alignment_vis.py: directions equal scipy's, coordinates transformers', scores the formulas; its command line."""

import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

import alignment_vis
import cache
from tests.conftest import configure, flags, make_texts, only_result, run_command, write_rows
from utils import separability
from utils.pictures import plot_alignment
from utils.results import read_stored
from utils.script import UserError
from utils.settings import with_values

pytestmark = pytest.mark.slow

GROUPS = ("colour=red,green,house", "size=small,large,engine", "rest=the,of")
GROUPED = ["red", "green", "house", "small", "large", "engine", "the", "of"]
COMPONENTS = ["component_1", "component_2"]


@pytest.fixture(scope="module")
def made(names, tmp_path_factory):
    """Folder with the moments of the train split; tests work on copies."""
    results_dir = tmp_path_factory.mktemp("made")
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
        metadata = read_stored(path)
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


@pytest.mark.parametrize(("layer", "center"), [(1, False), (2, True)])
def test_coordinates_are_states_times_scipy_s_top_eigenvectors(config, layer, center):
    config = with_values(config, layer=layer, center=center)
    alignment_vis.main(config)
    path, result = only_result(config.run.results_dir, "alignment/*/rows.*.json")
    table = pd.read_csv(path.with_suffix(".csv"))
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
            value = measured_by_scikit_learn(x, labels)["silhouette"]
            assert described["separability"][group]["silhouette"]["value"] == pytest.approx(value)


def measured_by_scikit_learn(x, labels) -> dict[str, float]:
    """Silhouette and leave-one-out accuracy of a logistic regression, in standardised coordinates."""
    scaled = StandardScaler().fit_transform(x)
    right = cross_val_score(LogisticRegression(), scaled, labels, cv=LeaveOneOut())
    return {"silhouette": silhouette_score(scaled, labels), "leave_one_out": right.mean()}


def test_scores_equal_scikit_learn_s_also_for_shuffled_labels_and_units_do_not_matter():
    random, labels = np.random.default_rng(1), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    x = random.normal(size=(9, 3)) + labels[:, None]
    scores = separability.separability(x, labels, num_shuffles=8, seed=4)
    random, expected = np.random.default_rng(4), measured_by_scikit_learn(x, labels)
    shuffled = [measured_by_scikit_learn(x, random.permutation(labels)) for _ in range(8)]
    for name, value in expected.items():
        drawn = np.array([each[name] for each in shuffled])
        p = (1 + (drawn >= value - 1e-9).sum()) / 9
        assert scores[name] == pytest.approx({"value": value, "shuffled": drawn.mean(), "p": p})
    assert 0.3 < scores["leave_one_out"]["value"] < 1 and scores["silhouette"]["p"] < 1
    stretched = separability.separability(x * [1e-3, 50, 2] + [0, 3000, 7], labels, num_shuffles=8, seed=4)
    assert stretched == {name: pytest.approx(score) for name, score in scores.items()}


def test_line_is_that_of_logistic_regression():
    random, is_first = np.random.default_rng(2), np.repeat([True, False], [5, 4])
    x = random.normal(size=(9, 2)) * [0.01, 20] + np.where(is_first, 0.01, -0.01)[:, None] + [3, -7]
    weights, intercept = separability.separating_line(x, is_first)
    expected = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, is_first).decision_function(x)
    np.testing.assert_allclose(x @ weights + intercept, expected, rtol=1e-6)


def test_picture_shows_every_word_in_a_style_of_its_own_and_the_line():
    """Names are no mathematics and none is hidden: matplotlib hides labels that start with an underscore."""
    random, names = np.random.default_rng(0), ("_joy $x_$", *"abcdefg")
    words = {name: [f"{name}{i}" for i in range(5)] for name in names}
    words["a"][0] = "_cost$"
    rows = [
        (subspace, category, word, *random.normal(size=2) * scale)
        for subspace, scale in (("U", 5), ("V", 0.01))
        for category, listed in words.items()
        for word in listed
    ]
    table = pd.DataFrame(rows, columns=["subspace", "category", "word", *COMPONENTS])
    figure = plot_alignment(table, notes={"U": "$1$", "V": "$_$"})
    figure.canvas.draw()  # a formula that matplotlib cannot parse raises here
    titles = ["Perception space, U'x\n$1$", "Autoregression space, V'x\n$_$"]
    assert [panel.get_title() for panel in figure.axes] == titles
    for panel, subspace in zip(figure.axes, "UV", strict=True):
        rows = table[table.subspace == subspace]
        points = [line for line in panel.lines if len(line.get_xydata()) == 1]
        np.testing.assert_allclose([point.get_xydata()[0] for point in points], rows[COMPONENTS])
        assert len({(point.get_marker(), tuple(np.ravel(point.get_color()))) for point in points}) == 40
        weights, intercept = separability.separating_line(rows[COMPONENTS].to_numpy()[:10], np.arange(10) < 5)
        [dashed] = [drawn for drawn in panel.lines if drawn.get_linestyle() == "--"]
        for point in (dashed.get_xy1(), dashed.get_xy2()):
            assert weights @ point == pytest.approx(-intercept, abs=1e-9 * (np.abs(weights) @ np.abs(point) + 1))
    shown, frame, legend = figure.legends[0].get_texts(), figure.bbox, figure.legends[0].get_window_extent()
    expected = [name for category, listed in words.items() for name in (category, *listed)]
    assert [text.get_text() for text in shown] == [*expected, "_joy $x_$ / a"]
    assert legend.y0 >= frame.y0 and legend.y1 <= frame.y1 and legend.x1 <= frame.x1


def test_command_line_writes_table_and_picture(names, config):
    options = flags(names | {"results_dir": config.run.results_dir, "num_shuffles": 2, "layer": -1})
    run = run_command("alignment_vis.py", *options, "--words", *GROUPS)
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


def test_tied_axes_are_refused(names, tmp_path):
    """Classes of equal size and fewer texts than dimensions: any rotation of the axes is a solution."""
    rows = [{"text": f"{text} {i}", "label": "abc"[i % 3]} for i, text in enumerate(make_texts(24))]
    names = names | {"dataset_name": str(write_rows(tmp_path / "rows.jsonl", rows)), "results_dir": tmp_path}
    cache.main(configure(cache, **names, split="all"))
    with pytest.raises(UserError, match=r"perception problem .* at layer 2 .*or equal ones"):
        alignment_vis.main(configure(alignment_vis, **names, split="all", layer=2, words=GROUPS))
