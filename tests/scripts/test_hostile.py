"""Hostile and broken input: it works, or is refused in a sentence; never a wrong number, never a traceback."""

import math
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cache
import K_sweep
from tests.conftest import configure, write_rows
from utils.data.load import LabelledTexts, load_splits
from utils.script import UserError
from utils.settings import Data, Run

PLAIN_TEXTS = ["a red house", "the river", "stone", "music of a small engine"]
ODD_TEXTS = [
    *("", "  \t\n ", "a", "x" * 100_000, "\u200b", "\ufeffa", "\x00", "a\x1b[31m\x07\x7f"),
    *("a\u2028b\u0085c", "\ud800", '"', None, 7, 0.5, math.nan, True, [], {"text": "a"}),
]
PLAIN_LABELS = ["yes", "no", "perhaps"]
ODD_LABELS = [
    *(None, True, -2, 3, 0.5, math.nan, math.inf, 10**400, 1e308, [1], [1, 2], {"a": 1}),
    *("", " ", "nan", "NA", "none", "a", "A", " a", "1", "1.0", "01", "inf", "-1", "\ud800", "\x00"),
]


def odd_rows(random: Random) -> list[dict]:
    """Plain rows and odd ones among them: of the texts, of the labels, or of both."""
    rows = [{"text": random.choice(PLAIN_TEXTS), "label": random.choice(PLAIN_LABELS)} for _ in range(6)]
    kind, numbers = random.randrange(4), random.random() < 0.5
    for row in rows[: random.randrange(5)]:
        row |= {"text": random.choice(ODD_TEXTS)} if kind in (0, 2) else {}
        row |= {"label": random.choice(ODD_LABELS)} if kind in (1, 2) else {}
    for row in rows if numbers else []:
        row["label"] = random.choice([0, 1, 2.5]) if row["label"] in PLAIN_LABELS else row["label"]
    return random.sample(rows, len(rows))


def found_or_refused(path: Path, **options) -> dict[str, LabelledTexts] | None:
    """The loaded texts; None if they are refused in one sentence."""
    try:
        return load_splits(Data(str(path), **options), Run(), "all")
    except UserError as error:
        message = str(error)
        assert len(message) > 20 and "\n" not in message.replace("\\n", "") and len(message) < 1500
        return None


def check(found: LabelledTexts, given: list[dict]) -> None:
    """Every loaded text has the label of a row with that text; no row comes twice, and no label is made up."""
    assert len(found.texts) == len(found.labels) and all(found.texts)
    texts = [str(row["text"]["text"] if isinstance(row["text"], dict) else row["text"]) for row in given]
    assert not Counter(found.texts) - Counter(texts)
    if found.is_regression:
        numbers = {as_number(row["label"]) for row in given}
        assert np.isfinite(found.labels).all() and set(found.labels.tolist()) <= numbers
        return
    assert found.labels.min() >= 0 and found.labels.max() < found.num_labels == len(set(found.labels.tolist()))
    by_text: dict[str, set[str]] = {}
    for text, label in zip(texts, (row["label"] for row in given), strict=True):
        spellings = {str(label).strip()}
        if (number := as_number(label)) is not None and math.isfinite(number) and number.is_integer():
            spellings |= {str(int(number)), str(label)}
        by_text.setdefault(text, set()).update(spellings)
    for text, label in zip(found.texts, found.labels, strict=True):
        assert found.label_names[label] in by_text[text]


def as_number(label) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return math.inf


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["auto", "classification", "regression"])
def test_odd_cells_work_or_are_refused(task, tmp_path):
    random, outcomes = Random(task), Counter()
    for _ in range(150):
        rows = odd_rows(random)
        found = found_or_refused(write_rows(tmp_path / "rows.jsonl", rows), task=task)
        outcomes["refused" if found is None else "works"] += 1
        if found:
            check(found["all"], rows)
    assert min(outcomes["refused"], outcomes["works"]) > 15, outcomes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from([b"text,label\n", b"a,b\n", b'"', b"\xff\xfe", b"\x00", b"c,d\r", b"\xef\xbb\xbf", b"{",
      b"[", b'{"text": "a", "label": NaN}\n', b'{"text": "b", "text": "c"}\n', b"\t"]), max_size=8).map(b"".join),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]),
)  # fmt: skip
def test_files_of_any_bytes_work_or_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    for part in (found_or_refused(path) or {}).values():
        assert len(part.texts) == len(part.labels) > 0 and all(part.texts)
        assert part.is_regression or set(part.labels) == set(range(part.num_labels))


def test_texts_of_one_token_and_of_100_000_characters_give_finite_scores(names, tmp_path):
    long = "the small stone of a large house " * 3000
    texts = [long, *("red", "a", "\x1b[31m\x07", "\u200b", "green river", "music", "engine", "of", "quickly")] * 4
    rows = [{"text": text + str(i), "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    shared = names | {"dataset_name": str(path), "results_dir": tmp_path / "results"}
    for split in ("train", "test"):
        cache.main(configure(cache, **shared, split=split))
    result = K_sweep.main(configure(K_sweep, **shared, picture=False))
    assert len(long) + 1 > 98_000 and 0 <= result["score"]["retained"]["value"] <= 1
