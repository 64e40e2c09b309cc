"""Real copies of hub datasets beside the repository: their classes as the files have them, and golden samples.

Skipped without copies; NTPS_REAL_DATASETS_DIR names another folder than ../shared/data.
"""

import os
from pathlib import Path

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


# fmt: off
EXPECTED: dict[str, tuple[str, dict[str, int] | int]] = {
    # fingerprints of train and test, of 300 rows each by seed 1; rows of each class, or how many classes of any size
    "ag_news": ("7dda6f8f9c46f603 56cb5a76d9b0f13f",
        {"World": 1259, "Sports": 1257, "Business": 1281, "Sci/Tech": 1203}),
    "climatebert/climate_sentiment": ("8480fc5a6e018b40 6d39de098c596c5c",
        {"risk": 342, "neutral": 408, "opportunity": 250}),
    "common_sense": ("612efdbf94956389 f91d0458c4fc55a6", {"A": 1909, "B": 1973, "C": 1946, "D": 1985, "E": 1928}),
    "emotion": ("a2843a19daeb697c 352e3913f63a3631",
        {"sadness": 4666, "joy": 5362, "love": 1304, "anger": 2159, "fear": 1937, "surprise": 572}),
    "imdb": ("d1c7be71899638d9 9a60c2e75fe4aa1d", {"neg": 5000, "pos": 5000}),
    "legacy-datasets/banking77": ("fe3a5b7005af12ba ee1522e26297fa75", 77),
    "marksverdhei/clickbait_title_classification": ("2123508366849552 6081c181f75c166d", {"0": 10009, "1": 9991}),
    "medical": ("4d09d50bcf782045 c2a7357686675f44", {"0": 1524, "1": 1524}),
    "rotten_tomatoes": ("dc97bba464962f6f 56b763db864de2e9", {"neg": 4265, "pos": 4265}),
    "snli": ("f480c19d526ba284 9e383ffe006cbb8e", {"entailment": 6667, "neutral": 6562, "contradiction": 6771}),
    "sst2": ("260fe06f1eddd214 ee43f76bef63e244", {"negative": 8864, "positive": 11136}),
    "toxigen": ("1a191167660fba80 432105f9b0c8a3df", {}),
    "trec": ("57a53ed1dfff2081 77cf3ecd5e2413d3",
        {"ABBR": 86, "ENTY": 1250, "DESC": 1162, "HUM": 1223, "LOC": 835, "NUM": 896}),  # codespell:ignore enty
    "ucirvine/sms_spam": ("02802b12badfccc7 ba40a0d04922c89b", {"ham": 4827, "spam": 747}),
    "wiki_toxic": ("916aaa165a5ca02f 0e1ba6886fbf4d5d", {"0": 5090, "1": 5090}),
}
# fmt: on
LABEL_COLUMNS = {"trec": "coarse_label"}


def folder(name: str) -> Path:
    return DATASETS / name.replace("/", "__")


def whole_split(name: str) -> str:
    """The split that keeps the file's order of rows: "all" for datasets without held-out rows."""
    return "train" if any((folder(name) / f"{split}.parquet").is_file() for split in ("test", "validation")) else "all"


PRESENT = [name for name in EXPECTED if folder(name).is_dir()]


def test_every_copy_is_expected():
    assert {path for path in DATASETS.iterdir() if path.is_dir()} == {folder(name) for name in PRESENT}


@pytest.mark.parametrize("name", PRESENT)
def test_classes_are_those_of_the_file(name):
    classes, split = EXPECTED[name][1], whole_split(name)
    rows = load_splits(Data(name, label_column=LABEL_COLUMNS.get(name)), Run(datasets_dir=DATASETS), split)[split]
    if rows.is_regression:
        assert not classes and 1 <= rows.labels.min() <= rows.labels.max() <= 5
        return
    counts = dict(zip(rows.label_names, np.bincount(rows.labels).tolist(), strict=True))
    assert counts == classes if isinstance(classes, dict) else len(counts) == classes


@pytest.mark.parametrize("name", PRESENT)
def test_samples_are_those_of_earlier_results(name):
    options = {"divide_train": name == "toxigen", "max_samples": 300, "seed": 1}
    found = load_splits(Data(name, label_column=LABEL_COLUMNS.get(name), **options), Run(datasets_dir=DATASETS))
    assert f"{found['train'].fingerprint} {found['test'].fingerprint}" == EXPECTED[name][0]
