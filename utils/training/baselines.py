"""Fit baselines without a language model: the majority class and a bag of words (for regression mean and ridge)."""

import re
from typing import Any

import numpy as np

from utils.data.load import LabelledTexts
from utils.script import UserError
from utils.training.metrics import classification_scores, regression_scores

# scripts that do not divide words by blanks: Thai, Lao and Tibetan; Burmese; Khmer; kana; Han
UNDIVIDED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)
UNDIVIDED_SHARE = 0.05  # share of the letters; a foreign word in a text stays below it


def tfidf_features(train: list[str], test: list[str]) -> tuple[Any, Any]:
    """TF-IDF features of the words of train, sparse (n, words) float32; one column of zeros if train has no word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    undivided = sum(len(UNDIVIDED.findall(text)) for text in train)
    letters = sum(character.isalnum() for text in train for character in text)
    characters = {"analyzer": "char", "ngram_range": (1, 3)}
    words = characters if undivided > UNDIVIDED_SHARE * letters else {"token_pattern": r"\w+"}
    vectorizer = TfidfVectorizer(**words, sublinear_tf=True, dtype=np.float32)
    try:
        return vectorizer.fit_transform(train), vectorizer.transform(test)
    except ValueError:  # empty vocabulary: texts of punctuation only
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))


def text_baselines(train: LabelledTexts, test: LabelledTexts) -> dict[str, dict[str, Any]]:
    """Scores of the class frequencies (or the mean) and of a bag of words, fitted on `train`, on both splits."""
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge

    bag, regression = tfidf_features(train.texts, test.texts), train.is_regression
    if regression:  # Ridge rounds targets to the type of the features before it subtracts their mean
        bag = tuple(features.astype(np.float64) for features in bag)
    models = {
        "majority": DummyRegressor() if regression else DummyClassifier(strategy="prior"),
        "bag_of_words": Ridge() if regression else LogisticRegression(C=10, max_iter=10_000),
    }
    baselines = {}
    for name, model in models.items():
        model.fit(bag[0], train.labels)
        baselines[name] = score(model, bag[1], test) | {"train": score(model, bag[0], train)}
    return baselines


def bag_of_words_folds(train: LabelledTexts, targets: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """R2 of ridge on TF-IDF on each fold that has texts, fitted on the others; targets (n, c), fold numbers (n,)."""
    from sklearn.linear_model import Ridge

    words, r2 = tfidf_features(train.texts, train.texts[:1])[0].astype(np.float64), []
    for fold in np.unique(folds):
        outside, inside = folds != fold, folds == fold
        fitted = Ridge().fit(words[outside], targets[outside]).predict(words[inside]).reshape(targets[inside].shape)
        baseline = np.square(targets[inside] - targets[outside].mean(0)).sum()
        if baseline < 1e-12 * np.square(targets - targets.mean(0)).sum():  # zero up to rounding
            raise UserError("The labels of a fold are the mean of the others: it has no R2. Change --num_folds.")
        r2.append(1 - np.square(targets[inside] - fitted).sum() / baseline)
    return np.array(r2)


def score(model: Any, features: Any, data: LabelledTexts) -> dict[str, Any]:
    """Scores of a fitted model; a class without a training text gets probability 0."""
    if data.is_regression:
        return regression_scores(data.labels, model.predict(features))
    probabilities = np.zeros((len(data.labels), data.num_labels))
    probabilities[:, model.classes_] = model.predict_proba(features)
    return classification_scores(data.labels, probabilities)
