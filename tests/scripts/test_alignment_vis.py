"""alignment_vis.py: directions equal scipy's, coordinates transformers', scores the formulas; its command line."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.optimize
import torch
from matplotlib import pyplot as plt
from transformers import AutoModel, AutoTokenizer

import alignment_vis
import cache
from tests.conftest import configure, make_texts, run_in_process, write_rows
from utils import separability
from utils.pictures import plot_alignment
from utils.results import open_tensors
from utils.script import UserError
from utils.separability import separating_line
from utils.settings import flatten, with_values

pytestmark = pytest.mark.slow

GROUPS = ("colour=red,green,house", "size=small,large,engine", "rest=the,of")
GROUPED = ["red", "green", "house", "small", "large", "engine", "the", "of"]
COMPONENTS = ["component_1", "component_2"]


@pytest.fixture(scope="session")
def made(model_dirs, rows_path, tmp_path_factory):
    """Folder with the moments of the train split; tests work on copies."""
    results_dir = tmp_path_factory.mktemp("made")
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}
    cache.main(configure(cache, **names, results_dir=results_dir))
    return results_dir


@pytest.fixture
def config(made, model_dirs, rows_path, tmp_path):
    shutil.copytree(made, tmp_path / "results")
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}
    return configure(alignment_vis, **names, results_dir=tmp_path / "results", words=GROUPS, num_shuffles=2)


def shared(config) -> dict:
    """The settings of the moments."""
    return {name: flatten(config)[name] for name in ("model_name", "dataset_name", "results_dir")}


def command(config, *more):
    values = shared(config) | {"num_shuffles": 2}
    return ["alignment_vis.py", *(word for name, value in values.items() for word in (f"--{name}", value)), *more]


def result_of(config, name="rows.layer0") -> dict:
    [path] = config.run.results_dir.glob(f"alignment/*/{name}.json")
    return json.loads(path.read_text())


def table_of(config, name="rows.layer0") -> pd.DataFrame:
    [path] = config.run.results_dir.glob(f"alignment/*/{name}.csv")
    return pd.read_csv(path)


def dense_solutions(config, layer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All eigenvalues and eigenvectors of both problems by scipy, largest first, from the matrices as they are."""
    [path] = config.run.results_dir.glob("moments/*/*/train.safetensors")
    with open_tensors(path) as (file, metadata):
        mu, b, m, c0, c1, prefix, following = (
            file.get_tensor(f"layer.{layer}.{name}").numpy()
            for name in (
                *("pooled_mean", "pooled_label_cross_moment", "pooled_second_moment"),
                *("prefix_second_moment", "prefix_next_cross_moment", "prefix_mean", "next_mean"),
            )
        )
        label_mean, pairs = file.get_tensor("label_mean").numpy(), metadata["num_pairs"] / metadata["num_samples"]
    if config.center:
        b, m = b - np.outer(mu, label_mean), m - np.outer(mu, mu)
        c0, c1 = c0 - np.outer(prefix, prefix) / pairs, c1 - np.outer(prefix, following) / pairs
    solved = {}
    for name, factor, denominator in (("U", b, m), ("V", c1, c0)):
        variances, axes = np.linalg.eigh(denominator)
        axes = axes[:, variances > 1e-10 * variances[-1]]  # fewer tokens than dimensions: C is singular at layer 0
        values, vectors = scipy.linalg.eigh(axes.T @ factor @ factor.T @ axes, axes.T @ denominator @ axes)
        solved[name] = values[::-1], axes @ vectors[:, ::-1]
    return solved


def states_by_transformers(folder, words, layer) -> np.ndarray:
    """Mean over its tokens of each word's hidden state, word by word."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        outputs = [model(**tokenizer(word, return_tensors="pt"), output_hidden_states=True) for word in words]
    return np.stack([output.hidden_states[layer][0].double().mean(0).numpy() for output in outputs])


# ------------------------------------------------------------------ coordinates
@pytest.mark.parametrize(("layer", "center"), [(0, False), (1, False), (2, True)])
def test_coordinates_are_states_times_scipy_s_top_eigenvectors(config, layer, center):
    config = with_values(config, layer=layer, center=center)
    alignment_vis.main(config)
    name = f"rows.layer{layer}" + (".centered" if center else "")
    table, result = table_of(config, name), result_of(config, name)
    states = states_by_transformers(config.model.model_name, GROUPED, layer)
    for subspace, (values, vectors) in dense_solutions(config, layer).items():
        rows = table[table.subspace == subspace]
        assert list(rows.word) == GROUPED and list(rows.category) == [g for g, n in zip(
            ("colour", "size", "rest"), (3, 3, 2), strict=True) for _ in range(n)]  # fmt: skip
        expected = states @ vectors[:, :2]
        gap = expected[:3].mean(0) - expected[3:6].mean(0)
        if (layer, subspace) == (0, "U"):  # fewer tokens than dimensions: u'x = 1 on all of them, the sum of labels
            assert np.ptp(expected[:, 0]) < 1e-6 and abs(expected[0, 0]) > 0.1
            gap[0] = expected[0, 0]
        expected *= np.where(gap < 0, -1, 1)
        np.testing.assert_allclose(rows[COMPONENTS], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(
            result["subspaces"][subspace]["eigenvalues"], values[:2], rtol=1e-5
        )  # float32 products
        assert values[0] > values[1] > values[2]


def test_more_components_only_add_columns(config):
    alignment_vis.main(config)
    two, name = table_of(config), config.model.model_name.split("/")[-1]
    alignment_vis.main(with_values(config, num_components=3, overwrite=True))
    three = table_of(config)
    assert list(three.columns) == ["subspace", "category", "word", *COMPONENTS, "component_3"]
    np.testing.assert_allclose(three[COMPONENTS], two[COMPONENTS])
    assert (config.run.results_dir / "alignment" / name / "rows.layer0.png").stat().st_size > 10_000


@pytest.mark.parametrize("layer", [0, 1])
def test_signs_do_not_depend_on_the_solver(config, monkeypatch, layer):
    config = with_values(config, layer=layer)
    alignment_vis.main(config)
    expected, solve = table_of(config, f"rows.layer{layer}"), alignment_vis.solve_generalized_eigenproblem

    def flipped(factor, denominator):
        solved = solve(factor, denominator)
        signs = 2.0 * (torch.arange(len(solved.eigenvalues)) % 2) - 1  # -1, 1, -1, ...
        return dataclasses.replace(solved, coordinates=solved.coordinates * signs)

    monkeypatch.setattr(alignment_vis, "solve_generalized_eigenproblem", flipped)
    alignment_vis.main(with_values(config, overwrite=True))
    pd.testing.assert_frame_equal(table_of(config, f"rows.layer{layer}"), expected)
    means = expected.groupby(["subspace", "category"])[COMPONENTS].mean()
    for subspace in "UV":
        assert (means.loc[subspace, "colour"] > means.loc[subspace, "size"] - 1e-6).all()
    if layer == 0:  # where the first component is the same for all words, it is positive
        np.testing.assert_allclose(means.loc["U"].component_1, 1, atol=1e-5)


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


@pytest.mark.parametrize("gap", [0.0, 1.0, 3.0])
def test_scores_equal_their_formulas(gap):
    random, labels = np.random.default_rng(1), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    x = random.normal(size=(9, 3)) + gap * labels[:, None]
    scores = separability.measure(x, labels)
    right = []
    for i in range(9):
        w = logistic_weights(np.delete(x, i, 0), np.delete(labels, i) == 0)
        right.append((x[i] @ w[:-1] + w[-1] > 0) == (labels[i] == 0))
    assert scores["leave_one_out"] == pytest.approx(np.mean(right))
    assert scores["silhouette"] == pytest.approx(silhouette_by_hand(x, labels))
    three = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert separability.measure(x, three)["silhouette"] == pytest.approx(silhouette_by_hand(x, three))


def test_shuffled_labels_tell_chance_and_units_do_not_matter():
    labels = np.repeat([0, 1], 6)
    x = np.random.default_rng(0).normal(size=(12, 2))
    apart = separability.separability(x + 9 * labels[:, None], labels, num_shuffles=20, seed=4)
    assert apart["leave_one_out"]["value"] == 1 and apart["silhouette"]["value"] > 0.7
    assert apart["leave_one_out"]["p"] == apart["silhouette"]["p"] == 1 / 21
    assert 0.2 < apart["leave_one_out"]["shuffled"] < 0.5  # below one half, as the module says
    mixed = separability.separability(x, labels, num_shuffles=20, seed=4)
    random, scaled = np.random.default_rng(4), (x - x.mean(0)) / x.std(0)
    drawn = np.array([silhouette_by_hand(scaled, random.permutation(labels)) for _ in range(20)])
    assert mixed["silhouette"]["shuffled"] == pytest.approx(drawn.mean())
    assert mixed["silhouette"]["p"] == pytest.approx((1 + (drawn >= mixed["silhouette"]["value"] - 1e-9).sum()) / 21)
    assert mixed["silhouette"]["p"] > 0.1
    stretched = separability.separability(x * [1e-3, 50] + [0, 3000], labels, num_shuffles=20, seed=4)
    for name in ("silhouette", "leave_one_out"):
        assert stretched[name] == pytest.approx(mixed[name])


def test_line_is_that_of_logistic_regression():
    random, is_first = np.random.default_rng(2), np.repeat([True, False], [5, 4])
    x = random.normal(size=(9, 2)) * [0.01, 20] + np.where(is_first, 0.01, -0.01)[:, None] + [3, -7]
    line = separating_line(x, is_first)
    w = logistic_weights((x - x.mean(0)) / x.std(0), is_first)
    expected = np.append(w[:2] / x.std(0), w[2] - w[:2] / x.std(0) @ x.mean(0))
    np.testing.assert_allclose([*line["weights"], line["intercept"]], expected, rtol=1e-3)


def test_result_holds_the_scores_of_its_own_table(config):
    alignment_vis.main(config)
    result, table = result_of(config), table_of(config)
    for subspace, described in result["subspaces"].items():
        rows = table[table.subspace == subspace]
        for group, labels in (("first_two", [0, 0, 0, 1, 1, 1]), ("all", [0, 0, 0, 1, 1, 1, 2, 2])):
            x = rows[COMPONENTS].to_numpy()[: len(labels)]
            z = (x - x.mean(0)) / x.std(0)
            z[:, np.ptp(x, axis=0) < 1e-5] = 0
            value = silhouette_by_hand(z, np.array(labels))
            assert described["separability"][group]["silhouette"]["value"] == pytest.approx(value)
    tokenizer = AutoTokenizer.from_pretrained(config.model.model_name)
    assert result["num_tokens"] == {word: len(tokenizer.tokenize(word)) for word in GROUPED}
    assert result["num_samples"] == 168


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


def test_picture_from_the_table_alone():
    table = alignment_table({"joy": 4, "sad": 3, "be": 5})
    figure = plot_alignment(table)
    assert [panel.get_title() for panel in figure.axes] == ["Perception space, U'x", "Autoregression space, V'x"]
    for panel, subspace in zip(figure.axes, "UV", strict=True):
        rows = table[table.subspace == subspace]
        points = [line.get_xydata()[0] for line in panel.lines if len(line.get_xydata()) == 1]
        np.testing.assert_allclose(points, rows[COMPONENTS])
        line = separating_line(rows[COMPONENTS].to_numpy()[:7], np.arange(7) < 4)
        [dashed] = [drawn for drawn in panel.lines if drawn.get_linestyle() == "--"]
        for x, y in (dashed.get_xy1(), dashed.get_xy2()):
            scale = np.abs(line["weights"]) @ np.abs([x, y])
            assert line["weights"][0] * x + line["weights"][1] * y + line["intercept"] == pytest.approx(
                0, abs=1e-9 * (scale + 1)
            )
        for low, high, values in ((*panel.get_xlim(), rows.component_1), (*panel.get_ylim(), rows.component_2)):
            spread = values.max() - values.min()
            assert low < values.min() and high > values.max() and high - low < 1.5 * spread  # the line stretches none
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("joy", "joy0", "joy1", "joy2", "joy3", "sad", "sad0", "sad1", "sad2"),
        *("be", "be0", "be1", "be2", "be3", "be4", "joy / sad"),
    ]
    bold = [text.get_text() for text in legend.get_texts() if text.get_fontweight() == "bold"]
    assert bold == ["joy", "sad", "be"]
    plt.close(figure)


def test_picture_takes_notes_and_many_words():
    table = alignment_table({name: 5 for name in "abcdefgh"})
    figure = plot_alignment(table, {"U": "first note", "V": "second note"})
    assert figure.axes[0].get_title().endswith("first note") and figure.axes[1].get_title().endswith("second note")
    styles = [(line.get_marker(), tuple(np.ravel(line.get_color()))) for line in figure.axes[0].lines]
    points = [style for style in styles if style[0] not in ("None", None)]
    assert len(set(points)) == 40  # no two words alike
    figure.canvas.draw()
    box, [legend] = figure.bbox, figure.legends
    seen = legend.get_window_extent()
    assert seen.y0 >= box.y0 and seen.y1 <= box.y1 and seen.x1 <= box.x1
    plt.close(figure)


# ------------------------------------------------------------------ command line and mistakes
def test_command_line_writes_reuses_and_refuses(config, monkeypatch, capsys):
    assert run_in_process(monkeypatch, *command(config, "--layer", "-1", "--words", *GROUPS)) == 0
    [path] = config.run.results_dir.glob("alignment/*/rows.layer2.json")
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[-1] == str(path)
    assert "leave-one-out" in printed and "colour / size" in printed
    names = [f"rows.layer2.{suffix}" for suffix in ("csv", "json", "pdf", "png")]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    before, table = path.read_text(), path.with_suffix(".csv").read_text()
    path.with_suffix(".csv").unlink()
    last = with_values(config, layer=2)  # the same as -1
    with monkeypatch.context() as patch:
        patch.setattr(alignment_vis, "align", lambda *_: pytest.fail("computed again"))
        alignment_vis.main(last)
    assert path.read_text() == before and path.with_suffix(".csv").read_text() == table
    with pytest.raises(UserError, match=r"words: .*colour.* there, .*Joy.* now"):
        alignment_vis.main(with_values(last, words=None))
    cache.main(configure(cache, **shared(config), pooling="last", overwrite=True))
    with pytest.raises(UserError, match="made from other moments"):
        alignment_vis.main(last)


def test_settings_left_at_their_default_are_those_of_the_moments(config):
    cache.main(configure(cache, **shared(config), dtype="bfloat16", overwrite=True))
    alignment_vis.main(config)
    assert result_of(config)["config"]["dtype"] == "bfloat16"
    states = states_by_transformers(config.model.model_name, GROUPED, 0)
    ratio = table_of(config).query("subspace == 'U'").component_2 / (states @ dense_solutions(config, 0)["U"][1])[:, 1]
    assert 1e-6 < np.abs(np.abs(ratio) - 1).max() < 0.2  # its words went through a bfloat16 model too


def test_words_of_the_domain(config):
    wordless = with_values(config, words=None)
    assert alignment_vis.complete_settings(wordless, 3).words == alignment_vis.PAPER_WORDS
    docstrings = with_values(wordless, dataset_name="docstrings/kind")
    assert alignment_vis.complete_settings(docstrings, 3).words == alignment_vis.DOCSTRING_WORDS
    for words in (alignment_vis.PAPER_WORDS, alignment_vis.DOCSTRING_WORDS):
        assert [len(listed) for listed in alignment_vis.parse_words(words).values()] == [4, 4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a=red,green", "small,large"), "'small,large', which is not category=word,word"),
        (("=red,green", "b=small,large"), "not category=word,word"),
        (("a=red,,green", "b=small,large"), "'a=red,,green', which is not category=word,word"),
        (("a=red,green",), "has 1 categories"),
        (("a=red,green", "b=small"), "one word of 'b'"),
        (("a=red,green", "b=small, red"), "red more than once"),
        (("a=red,green", "a=small,large"), "'a' twice"),
    ],
)
def test_bad_words_end_in_one_sentence(config, monkeypatch, words, message):
    code = run_in_process(monkeypatch, *command(config, "--words", *words))
    assert isinstance(code, str) and code.startswith("error: ") and message in code  # a string: exit code 1
    assert not (config.run.results_dir / "alignment").exists()


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--layer", "3"], ["no layer 3", "0 to 2", "-3 to -1"]),
        (["--layer", "-4"], ["no layer -4"]),
        (["--num_components", "4"], ["perception", "has 3 informative directions", "Set --num_components 3."]),
        (["--num_components", "3", "--center"], ["has 2", "--num_components 2, or drop --center"]),
        (["--dtype", "bfloat16"], ["dtype: 'float32' there, 'bfloat16' now", "--overwrite"]),
        (["--device", "gpu9"], ["--device gpu9"]),
    ],
)
def test_impossible_requests_end_in_one_sentence(config, monkeypatch, options, messages):
    code = run_in_process(monkeypatch, *command(config, "--words", *GROUPS, *options))
    assert isinstance(code, str) and all(message in code for message in ("error: ", *messages)), code
    assert not (config.run.results_dir / "alignment").exists()


@pytest.mark.parametrize(
    ("label", "layer", "message"),
    [
        (lambda i, text: len(text) / 7, 0, "has 1 informative directions .* Choose a dataset with more classes"),
        # classes of equal size and fewer texts than dimensions: any rotation of the axes is a solution
        (lambda i, text: "abc"[i % 3], 0, "perception problem .* has equal eigenvalues at layer 0"),
        (lambda i, text: "abc"[i % 3], 2, "perception problem .* has equal eigenvalues at layer 2"),
    ],
)
def test_arbitrary_axes_are_refused(model_dirs, tmp_path, label, layer, message):
    rows = [{"text": f"{text} {i}", "label": label(i, text)} for i, text in enumerate(make_texts(30))]
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", rows[:24])
    write_rows(tmp_path / "rows" / "test.jsonl", rows[24:])
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(tmp_path / "rows"), "results_dir": tmp_path}
    cache.main(configure(cache, **names))
    with pytest.raises(UserError, match=message):
        alignment_vis.main(configure(alignment_vis, **names, layer=layer, words=GROUPS))
    assert not (tmp_path / "alignment").exists()


def test_names_in_a_picture_are_no_mathematics_and_none_is_hidden():
    table = alignment_table({"_joy $x_$": 2, "sad": 2})
    table.loc[table.word == "sad0", "word"] = "_cost$"
    figure = plot_alignment(table, notes={"U": "$1$", "V": "$_$"})
    figure.canvas.draw()  # a formula that matplotlib cannot parse raises here
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "_joy $x_$" in shown and "_cost$" in shown
    plt.close(figure)


def test_moments_of_the_embedded_model_are_made(monkeypatch, tmp_path):
    asked = []

    def stop(config, data):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "ensure", stop)
    names = {"dataset_name": "docstrings/kind", "split": "test", "results_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        alignment_vis.main(configure(alignment_vis, **names))
    assert asked == [configure(cache, **names)]


def test_a_state_that_is_not_finite_names_the_word(config, monkeypatch):
    pool = alignment_vis.pool

    def broken(hidden_states, *rest):
        pooled = pool(hidden_states, *rest)
        pooled[4, 7] = torch.nan
        return pooled

    monkeypatch.setattr(alignment_vis, "pool", broken)
    with pytest.raises(UserError, match="'large' at layer 0 is not finite"):
        alignment_vis.main(config)
    assert not (config.run.results_dir / "alignment").exists()


@pytest.mark.parametrize("change", [{"num_components": 1}, {"num_shuffles": 0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        configure(alignment_vis, **change)
