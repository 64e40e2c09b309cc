"""Scores equal their formulas; the bag of words is scikit-learn's, of characters in scripts without blanks."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from tests.conftest import make_texts
from utils.data.load import LabelledTexts
from utils.training.baselines import bag_of_words_folds, text_baselines
from utils.training.metrics import classification_scores, regression_scores


def labelled(texts, labels, names=("no", "yes")) -> LabelledTexts:
    return LabelledTexts(texts, np.array(labels), list(names), "")


def divided(texts, labels, num_train, names=("no", "yes")) -> tuple[LabelledTexts, LabelledTexts]:
    """The first texts to train on, the others to test on."""
    return tuple(labelled(texts[part], labels[part], names) for part in (slice(num_train), slice(num_train, None)))


def test_scores_equal_their_formulas():
    labels = np.array([0, 0, 0, 2])  # class 1 is absent
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.3, 0.3, 0.4]], dtype=np.float32)
    scores = classification_scores(labels, probabilities)
    assert scores["accuracy"] == 0.75
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["macro_f1"] == pytest.approx((0.8 + 0 + 1) / 3)
    assert scores["log_loss"] == pytest.approx(-np.log([0.7, 0.2, 0.6, 0.4]).mean(), rel=1e-6)
    targets, predictions = np.array([1.0, 2.0, 4.0]), np.array([1.5, 1.5, 3.5])
    scores = regression_scores(targets, predictions)
    assert scores["mse"] == 0.25 and scores["r2"] == pytest.approx(1 - 0.75 / (14 / 3))
    assert scores["mse_over_variance"] == pytest.approx(0.75 / (14 / 3))
    assert scores["pearson"] == pytest.approx(np.corrcoef(targets, predictions)[0, 1])
    constant = regression_scores(np.array([0.1] * 3), predictions)
    assert constant["r2"] is None and constant["pearson"] is None


def test_baselines_of_classes():
    names = ["no", "yes", "rare"]
    train = labelled(["good fine", "good nice", "bad awful", "good nice"] * 5, [1, 1, 0, 1] * 5, names)
    test = labelled(["bad", "fine good", "awful bad"], [0, 1, 0], names)
    baselines = text_baselines(train, test)
    assert baselines["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert baselines["majority"]["train"]["accuracy"] == 0.75
    assert baselines["majority"]["log_loss"] == pytest.approx(-np.log([0.25, 0.75, 0.25]).mean())
    assert baselines["bag_of_words"]["accuracy"] == 1.0 and baselines["bag_of_words"]["train"]["accuracy"] == 1.0
    wordless = labelled(["..", "!", "?", "."] * 5, train.labels, names)
    assert text_baselines(wordless, test)["bag_of_words"]["train"]["accuracy"] == 0.75


@pytest.mark.parametrize("foreign", [[], ["a word 词 of another script"]])
def test_bag_of_words_is_that_of_scikit_learn(foreign):
    texts = [*make_texts(80), *foreign]
    labels = [text.count("red") % 2 for text in texts]
    found = text_baselines(*divided(texts, labels, 60))["bag_of_words"]
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=10_000).fit(vectorizer.fit_transform(texts[:60]), labels[:60])
    probabilities = model.predict_proba(vectorizer.transform(texts[60:]))
    assert found["log_loss"] == pytest.approx(log_loss(labels[60:], probabilities, labels=[0, 1]), rel=1e-4)
    assert found["accuracy"] == accuracy_score(labels[60:], probabilities.argmax(1)) < 1


@pytest.mark.parametrize(
    "letters", ["天地玄黃宇宙洪荒日月盈昃", "あいうえおかきくけコサシ", "ｱｲｳｴｵｶｷｸｹｺｻｼ", "กขคงจฉชซาิีุ", "កខគឃងចឆជឈញដឋ"]
)
def test_characters_are_words_where_no_blank_divides_them(letters):
    """The class is the order of two neighbours in one long run of characters; half the texts end in English words."""
    random, texts = np.random.default_rng(0), []
    for row in range(200):
        run = "".join(random.choice([*letters[2:]], 30))
        run = run[: row % 25] + letters[:2][:: -1 if row % 2 else 1] + run[row % 25 :]
        texts.append(run + " and the red house" * (row % 4 < 2))
    found = text_baselines(*divided(texts, [row % 2 for row in range(200)], 150))["bag_of_words"]
    assert found["accuracy"] > 0.9


def test_targets_far_from_zero_have_the_scores_of_the_same_targets_around_it():
    texts, random = make_texts(90), np.random.default_rng(0)
    values = np.array([text.count("red") + 0.5 * text.count("stone") for text in texts]) + random.normal(size=90) / 10
    around, far = divided(texts, values, 60, []), divided(texts, values + 1e7, 60, [])
    expected, found = text_baselines(*around)["bag_of_words"], text_baselines(*far)["bag_of_words"]
    assert expected["r2"] > 0.5 and expected["pearson"] > 0.7
    assert text_baselines(*around)["majority"]["pearson"] is None
    for name in ("r2", "pearson"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
        assert found["train"][name] == pytest.approx(expected["train"][name], abs=1e-6)
    folds = np.arange(60) % 3
    near_r2, far_r2 = (bag_of_words_folds(train, train.labels[:, None], folds) for train, _ in (around, far))
    assert far_r2 == pytest.approx(near_r2, abs=1e-6)
