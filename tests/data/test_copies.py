"""Local copies of hub datasets: read as if they came from the hub."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel

import utils.data.load
from tests.data.test_data import load
from utils.data.load import find_source
from utils.data.table import DATASETS
from utils.script import UserError


def write_copy(path: Path, columns: dict[str, Any], label: str = "label", names: list[str] | None = None) -> None:
    rows = datasets.Dataset.from_dict(columns)
    if names:
        rows = rows.cast_column(label, ClassLabel(names=names))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)


def emotion_copy(folder: Path, names: list[str] | None) -> None:
    for split, repeats in (("train", 3), ("test", 2)):
        columns = {"text": [f"{split} {n}" for n in range(6 * repeats)], "label": list(range(6)) * repeats}
        write_copy(folder / "emotion" / f"{split}.parquet", columns, names=names)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the loader takes for --datasets_dir."""
    folder = tmp_path / "copies"
    folder.mkdir()
    monkeypatch.setattr(utils.data.load, "find_source", lambda name, revision, _: find_source(name, revision, folder))
    return folder


EMOTIONS = ["sadness", "joy", "love", "anger", "fear", "surprise"]


@pytest.mark.parametrize("names", [EMOTIONS, None])
def test_copy_is_read_as_from_the_hub(
    names: list[str] | None, copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emotion_copy(copies, names)
    train, test = load("emotion"), load("dair-ai/emotion", "test")
    assert train.label_names == test.label_names == EMOTIONS, "without metadata the table's names apply"
    assert train.texts == [f"train {n}" for n in range(18)] and test.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    out, err = capsys.readouterr()
    assert "own test" in out and "this copy or revision holds others" in err


def test_copies_keep_template_label_split_rule_and_groups(copies: Path) -> None:
    choices = {"label": list("ABCDE"), "text": ["u", "v", "w", "x", "y"]}
    for split, answers in (("train", "ABCDE"), ("validation", "EDCBA"), ("test", ["", "", "", "", ""])):
        columns = {"question": [f"{split}?"] * 5, "choices": [choices] * 5, "answerKey": list(answers)}
        write_copy(copies / "common_sense" / f"{split}.parquet", columns)
    found = load("common_sense", "test")
    assert found.texts[0] == "validation? (0) u (1) v (2) w (3) x (4) y" and found.labels.tolist() == [4, 3, 2, 1, 0]
    pairs = {
        "question_1": [f"Question {n // 2}?" for n in range(40)],
        "question_2": [f"other {n}" for n in range(40)],
        "label": [0, 1] * 20,
    }
    write_copy(copies / "medical" / "train.parquet", pairs, names=["0", "1"])
    parts = [{text.split("?")[0] for text in load("medical", split).texts} for split in ("train", "test")]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 20
    sms = {"sms": [f"text {n}\n" for n in range(20)], "label": [0, 1] * 10}
    write_copy(copies / "ucirvine__sms_spam" / "train.parquet", sms, names=["ham", "spam"])
    assert load("ucirvine/sms_spam", "test").texts[0].isprintable(), "the line break at the end of each is taken off"
    write_copy(copies / "toxigen" / "train.parquet", {"text": ["b'one'", "b'two'"], "toxicity_human": [1.5, 2.0]})
    assert load("toxigen", "all").texts == ["one", "two"]
    with pytest.raises(
        UserError, match=r"no split 'test'; splits: train\. Add one called test, or take --split all or --divide_train"
    ):
        load("toxigen")


def test_copy_outside_the_table(copies: Path) -> None:
    write_copy(
        copies / "user__news" / "train.parquet", {"text": list("abcd"), "topic": [0, 1] * 2}, "topic", ["x", "y"]
    )
    assert load("user/news", "all", label_column="topic").label_names == ["x", "y"]


def test_errors_of_copies(copies: Path) -> None:
    with pytest.raises(UserError, match=r"No copy of emotion .*emotion/train\.parquet is missing; copies: none"):
        load("emotion")
    with pytest.raises(UserError, match=r"elsewhere/emotion/train\.parquet is missing; copies: none"):
        find_source("emotion", datasets_dir=copies / "elsewhere")
    emotion_copy(copies, None)
    with pytest.raises(UserError, match="--dataset_revision main"):
        load("emotion", dataset_revision="main")
    write_copy(copies / "sst2" / "train.parquet", {"text": ["a"], "label": [0]})
    write_copy(copies / "sst2" / "validation.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(UserError, match=r"sst2 has no column 'sentence'; columns: text, label"):
        load("sst2")
    (copies / "imdb").mkdir()
    (copies / "imdb" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train\.parquet cannot be read as parquet"):
        load("imdb")


def test_class_names_of_the_table_are_as_many_as_its_classes() -> None:
    for spec in DATASETS.values():
        assert not spec.class_names or len(spec.class_names) == spec.num_classes


def test_test_rows_are_taken_from_train_where_that_is_asked_for(
    copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"text": [f"b'text {n}'" for n in range(40)], "toxicity_human": [1 + n % 9 / 2 for n in range(40)]}
    write_copy(copies / "toxigen" / "train.parquet", columns)
    with pytest.raises(UserError, match=r"no split 'test'.*or --divide_train"):
        load("toxigen")
    parts = [load("toxigen", split, divide_train=True) for split in ("train", "test")]
    assert [len(part.texts) for part in parts] == [28, 12] and parts[0].is_regression
    assert not set(parts[0].texts) & set(parts[1].texts)
    assert "seeded 70/30" in capsys.readouterr().out
    emotion_copy(copies, None)
    assert all(text.startswith("train") for text in load("emotion", "test", divide_train=True).texts), (
        "not its own test"
    )
    pairs = {"question_1": [f"Q {n // 2}?" for n in range(40)], "question_2": [f"other {n}" for n in range(40)]}
    write_copy(copies / "medical" / "train.parquet", {**pairs, "label": [0, 1] * 20}, names=["0", "1"])
    assert load("medical", divide_train=True).fingerprint == load("medical").fingerprint, "divided by question anyway"
