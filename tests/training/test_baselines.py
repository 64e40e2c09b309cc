"""The bag of words: scikit-learn at its C, and characters where no blank divides words."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from tests.conftest import make_texts
from utils.data.load import LabelledTexts
from utils.training.baselines import text_baselines


def labelled(texts: list[str], labels: list[int]) -> LabelledTexts:
    return LabelledTexts(texts, np.array(labels), ["no", "yes"], "")


def test_bag_of_words_is_that_of_scikit_learn():
    texts = [*make_texts(79), "a word 词 of another script"]
    labels = [text.count("red") % 2 for text in texts]
    found = text_baselines(labelled(texts[:60], labels[:60]), labelled(texts[60:], labels[60:]))["bag_of_words"]
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=10_000).fit(vectorizer.fit_transform(texts[:60]), labels[:60])
    probabilities = model.predict_proba(vectorizer.transform(texts[60:]))
    assert found["log_loss"] == pytest.approx(log_loss(labels[60:], probabilities, labels=[0, 1]), rel=1e-4)
    assert found["accuracy"] == accuracy_score(labels[60:], probabilities.argmax(1))


ALPHABETS = {
    "Chinese": "天地玄黃宇宙洪荒日月盈昃",
    "Japanese": "あいうえおかきくけコサシ",
    "half-width kana": "ｱｲｳｴｵｶｷｸｹｺｻｼ",
    "Thai": "กขคงจฉชซาิีุ",
    "Khmer": "កខគឃងចឆជឈញដឋ",
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("share", [1.0, 0.5])  # of the words; the others are English
def test_characters_are_words_where_no_blank_divides_them(alphabet, share):
    random = np.random.default_rng(0)
    letters = ALPHABETS[alphabet]
    texts = []
    for row in range(120):
        written = random.choice(list(letters[2:]), 12).tolist()
        written[random.integers(12)] = letters[row % 2]  # this one decides
        texts.append("".join(written) + (" and the red house" if row % 4 < 2 and share < 1 else ""))
    labels = [row % 2 for row in range(120)]
    found = text_baselines(labelled(texts[:80], labels[:80]), labelled(texts[80:], labels[80:]))["bag_of_words"]
    assert found["accuracy"] > 0.9
