"""Real copies of hub datasets beside the repository: labels and texts as a person reads them in the files, and scores.

The expectations were written down from the files.
Skipped without copies; NTPS_DATASETS_DIR names another folder than ../shared/data (tests/conftest.py).
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.conftest import ROOT
from utils.data.load import load_splits
from utils.settings import Data, Run

DATASETS = Path(os.environ.get("NTPS_REAL_DATASETS_DIR") or ROOT.parent / "shared" / "data")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATASETS.is_dir(), reason="no copies of hub datasets beside the repository"),
]


class Expected(NamedTuple):
    """The rows of a copy, and a text, or with dots its beginning, with its label."""

    fingerprints: str  # of train and test, of 300 rows each by seed 1
    classes: dict[str, int] | int  # rows of each class, or how many classes of whatever size
    text: str
    label: str | float
    row: int = 0
    label_column: str | None = None


# fmt: off
EXPECTED = {
    "ag_news": Expected("7dda6f8f9c46f603 56cb5a76d9b0f13f",
        {"World": 1259, "Sports": 1257, "Business": 1281, "Sci/Tech": 1203},
        "BEA buzzing about Beehive…", "Sci/Tech"),
    "climatebert/climate_sentiment": Expected("8480fc5a6e018b40 6d39de098c596c5c",
        {"risk": 342, "neutral": 408, "opportunity": 250},
        "− Scope 3: Optional scope that includes…", "neutral"),
    "common_sense": Expected("612efdbf94956389 f91d0458c4fc55a6",
        {"A": 1909, "B": 1973, "C": 1946, "D": 1985, "E": 1928},
        "The sanctions against the school were a punishing blow, and they seemed to what the efforts the school had "
        "made to change? (0) ignore (1) enforce (2) authoritarian (3) yell at (4) avoid", "A"),
    "emotion": Expected("a2843a19daeb697c 352e3913f63a3631",
        {"sadness": 4666, "joy": 5362, "love": 1304, "anger": 2159, "fear": 1937, "surprise": 572},
        "i didnt feel humiliated", "sadness"),  # codespell:ignore didnt
    "imdb": Expected("d1c7be71899638d9 9a60c2e75fe4aa1d",
        {"neg": 5000, "pos": 5000}, "If you like to see animals being skinned alive…", "neg"),
    "legacy-datasets/banking77": Expected("fe3a5b7005af12ba ee1522e26297fa75",
        77, "I am still waiting on my card?", "card_arrival"),
    "marksverdhei/clickbait_title_classification": Expected("2123508366849552 6081c181f75c166d",
        {"0": 10009, "1": 9991},
        "27 Ways To Create The Perfect Travel-Inspired Nursery", "1"),
    "medical": Expected("4d09d50bcf782045 c2a7357686675f44",
        {"0": 1524, "1": 1524},
        "After how many hour from drinking an antibiotic can I drink alcohol? I have a party tonight and I took my "
        "last dose of Azithromycin this morning. Can I have a few drinks?", "1"),
    "rotten_tomatoes": Expected("dc97bba464962f6f 56b763db864de2e9",
        {"neg": 4265, "pos": 4265},
        'the rock is destined to be the 21st century\'s new " conan "…', "pos"),
    "snli": Expected("f480c19d526ba284 9e383ffe006cbb8e",
        {"entailment": 6667, "neutral": 6562, "contradiction": 6771},
        "An older gentleman stands along the shore of an immense lake with a cityscape across the water. The man is "
        "gazing over the water thinking about his life.", "neutral"),
    "sst2": Expected("260fe06f1eddd214 ee43f76bef63e244",
        {"negative": 8864, "positive": 11136}, "empty stud knockabout ", "negative"),
    "toxigen": Expected("1a191167660fba80 432105f9b0c8a3df",
        {}, "the pueblo are a federally recognized tribe", 4 / 3, row=16),
    "trec": Expected("57a53ed1dfff2081 77cf3ecd5e2413d3",

        {"ABBR": 86, "ENTY": 1250, "DESC": 1162, "HUM": 1223, "LOC": 835, "NUM": 896},  # codespell:ignore enty
        "How did serfdom develop in and then leave Russia ?", "DESC", label_column="coarse_label"),
    "ucirvine/sms_spam": Expected("02802b12badfccc7 ba40a0d04922c89b",
        {"ham": 4827, "spam": 747},
        "Go until jurong point, crazy.. Available only in bugis n great world la e buffet... Cine there got amore "
        "wat...", "ham"),
    "wiki_toxic": Expected("916aaa165a5ca02f 0e1ba6886fbf4d5d",
        {"0": 5090, "1": 5090}, "Removed that section on August 12, 2010.", "0", row=136),
}
# fmt: on


def folder(name: str) -> Path:
    return DATASETS / name.replace("/", "__")


def whole_split(name: str) -> str:
    """The split that keeps the file's order of rows: "all" for datasets without held-out rows."""
    return "train" if any((folder(name) / f"{split}.parquet").is_file() for split in ("test", "validation")) else "all"


PRESENT = [name for name in EXPECTED if folder(name).is_dir()]


def test_every_copy_is_expected():
    assert {path for path in DATASETS.iterdir() if path.is_dir()} == {folder(name) for name in PRESENT}


@pytest.mark.parametrize("name", PRESENT)
def test_texts_and_classes_are_those_of_the_file(name):
    expected, split = EXPECTED[name], whole_split(name)
    rows = load_splits(Data(name, label_column=expected.label_column), Run(datasets_dir=DATASETS), split)[split]
    text, label = rows.texts[expected.row], rows.labels[expected.row]
    assert text.startswith(expected.text[:-1]) if expected.text.endswith("…") else text == expected.text
    if rows.is_regression:
        assert label == pytest.approx(expected.label, abs=1e-6) and 1 <= rows.labels.min() <= rows.labels.max() <= 5
        return
    counts = dict(zip(rows.label_names, np.bincount(rows.labels).tolist(), strict=True))
    assert counts == expected.classes if isinstance(expected.classes, dict) else len(counts) == expected.classes
    assert rows.label_names[label] == expected.label


@pytest.mark.parametrize("name", PRESENT)
def test_samples_are_those_of_earlier_results(name):
    settings = Data(
        name, label_column=EXPECTED[name].label_column, divide_train=name == "toxigen", max_samples=300, seed=1
    )
    found = load_splits(settings, Run(datasets_dir=DATASETS))
    assert f"{found['train'].fingerprint} {found['test'].fingerprint}" == EXPECTED[name].fingerprints
