"""The known datasets on made-up rows in their own column schema, the hub's errors, and local copies."""

from string import Formatter
from typing import Any
from unittest.mock import Mock

import datasets
import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

from tests.data.inputs import load, write_labels, write_parquet
from utils.data.load import LabelledTexts
from utils.data.splits import paper_split
from utils.data.table import DATASETS, SPECS, DatasetSpec
from utils.script import UserError

TEXT_LABELS = ("Bhuvaneshwari/intent_classification", "common_sense", "DBPedia_Classes", "Topic_Classification")
HIDDEN = {"sst2": "test", "common_sense": "test", "imdb": "unsupervised"}  # splits with labels that are -1 or empty


def class_names(spec: DatasetSpec) -> list[str]:
    if spec.class_names or spec.key not in TEXT_LABELS:
        return list(spec.class_names or map(str, range(spec.num_classes or 0)))
    return [f"Kind {number:02}" for number in range(spec.num_classes or 4)]


def num_rows(spec: DatasetSpec) -> int:
    return 10 * max(len(class_names(spec)), 2)


def label_of(spec: DatasetSpec, split: str, row: int) -> str | float | None:
    if split == HIDDEN.get(spec.key) or (spec.key == "snli" and row >= num_rows(spec) - 3):
        return None
    names = class_names(spec)
    return names[row % len(names)] if names else 1 + row / 7


def made_up(spec: DatasetSpec, split: str) -> dict[str, list[Any]]:
    """Rows in the dataset's own columns, and two more columns; the files of the intents are equal."""
    rows, names = range(num_rows(spec)), [name for _, name, _, _ in Formatter().parse(spec.text_template) if name]
    tag = "" if spec.key == "Bhuvaneshwari/intent_classification" else split
    columns: dict[str, list[Any]] = {name: [f"{name} {tag} {row}" for row in rows] for name in (*names, "more")}
    if spec.group_by:
        columns["question_1"] = [f"Question {row // 2}?" if row % 2 else f" question  {row // 2}? " for row in rows]
    if "choices" in names:
        columns["choices"] = [{"label": ["A", "B"], "text": [f"one {tag} {row}", "two"]} for row in rows]
    labels = [label_of(spec, split, row) for row in rows]
    if spec.key in TEXT_LABELS:
        labels = [label or "" for label in labels]
    elif spec.num_classes:
        labels = [-1 if label is None else class_names(spec).index(str(label)) for label in labels]
    return {**columns, "number": list(rows), spec.label_column: labels}


def expected(spec: DatasetSpec, split: str) -> list[tuple[str, str | float]]:
    """Text and label of each labelled row."""
    columns, pairs = made_up(spec, split), []
    for row in range(num_rows(spec)):
        cells = {name: column[row] for name, column in columns.items()}
        if "choices" in cells:
            cells["choices"] = "(0) {} (1) {}".format(*cells["choices"]["text"])
        if (label := label_of(spec, split, row)) is not None:
            pairs.append((spec.text_template.format(**cells), label))
    return pairs


def pairs_of(part: LabelledTexts) -> list[tuple[str, str | float]]:
    labels = [part.label_names[label] for label in part.labels] if part.label_names else part.labels.tolist()
    return list(zip(part.texts, labels, strict=True))


def splits_of(spec: DatasetSpec) -> list[str]:
    held_out = {spec.test_split, "validation", HIDDEN.get(spec.key, "validation")} if spec.test_split else set()
    return ["train", *sorted(map(str, held_out))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the hub by made-up rows; returns the requests that the library received."""
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        spec = DATASETS[path]
        return {split: datasets.Dataset.from_dict(made_up(spec, split)) for split in splits_of(spec)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_known_dataset(spec, calls, tmp_path):
    train, test = load(spec.key), load(spec.hub_id, "test")
    asked = {"path": spec.hub_id, "name": spec.config, "revision": spec.revision, "data_files": spec.data_files}
    assert calls == [asked, asked], "key and hub id are one dataset"
    assert train.label_names == test.label_names == class_names(spec)
    if spec.test_split is None:
        assert sorted(pairs_of(train) + pairs_of(test)) == sorted(expected(spec, "train"))
        assert len(test.texts) == pytest.approx(0.3 * num_rows(spec), abs=1)
    else:
        assert pairs_of(train) == expected(spec, "train") and pairs_of(test) == expected(spec, spec.test_split)
    for split in splits_of(spec):
        write_parquet(tmp_path / spec.key.replace("/", "__") / f"{split}.parquet", made_up(spec, split))
    for split, part in (("train", train), ("test", test)):
        copy = load(spec.key, split, tmp_path)
        assert copy.fingerprint == part.fingerprint and copy.label_names == part.label_names
    assert len(calls) == 2, "the copy is read without the hub"


def test_nineteen_datasets_in_the_table():
    assert len(SPECS) == len({spec.key for spec in SPECS}) == 19
    assert all(len(spec.class_names) in (0, spec.num_classes) for spec in SPECS)
    for spec in SPECS:  # a short hash is not accepted by the hub
        assert spec.revision is None or len(spec.revision) == 40 or "/" in spec.revision


def stub_hub(monkeypatch: pytest.MonkeyPatch, **splits: dict[str, list[Any]]) -> None:
    loaded = {split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", Mock(return_value=loaded))


def test_medical_keeps_a_question_on_one_side(calls, capsys):
    def questions(part: LabelledTexts) -> set[str]:
        return {" ".join(text.lower().split()[:2]) for text in part.texts}

    train, test = load("medical"), load("medical", "test")
    assert not questions(train) & questions(test)
    assert len(questions(train) | questions(test)) == num_rows(DATASETS["medical"]) / 2
    assert "grouped 70/30" in capsys.readouterr().out
    paper_train = load("medical", ungrouped_split=True)
    assert "seeded 70/30" in capsys.readouterr().out
    paper_test = load("medical", "test", ungrouped_split=True)
    assert questions(paper_train) & questions(paper_test), "the paper's split separates rows, not questions"
    order, rows = paper_split(num_rows(DATASETS["medical"]))[0], expected(DATASETS["medical"], "train")
    assert pairs_of(paper_train) == [rows[row] for row in order]


def test_leak_of_the_intents_is_found(calls, capsys):
    load("Bhuvaneshwari/intent_classification")
    out, err = capsys.readouterr()
    assert "120 train and 120 test texts, 12 classes, own test, 100.0% of the test texts are also in train" in out
    assert "warning: 100.0% of the test texts" in err
    load("emotion")
    out, err = capsys.readouterr()
    assert "0.0% of the test texts" in out and "of the test texts" not in err
    assert "had 16,000 and 2,000 rows" in err, "a size other than the table's is told"


def test_all_is_every_labelled_row_and_a_seed_moves_no_known_split(calls):
    assert len(load("sst2", "all").texts) == 40  # its hidden test split is left out
    assert len(load("imdb", "all").texts) == 60
    assert len(load("ucirvine/sms_spam", "all").texts) == 20
    for key in ("ucirvine/sms_spam", "medical"):
        assert load(key, seed=0).fingerprint == load(key, seed=1).fingerprint


def test_columns_of_a_known_dataset_can_be_overridden(calls):
    pair = load("amazon_polarity", text_template="{more}: {content}")
    assert pair.texts[3] == "more train 3: content train 3"
    assert load("amazon_polarity", text_column="more").texts[3] == "more train 3"
    assert load("bias_in_bios", label_column="number", task="regression").is_regression
    assert load("toxigen", task="classification").num_labels == 20


def test_hub_rows_that_cannot_serve_are_left_out(monkeypatch, capsys):
    train = {"text": ["a", " ", "b", "c"], "label": ["x", "x", "y", None]}
    stub_hub(monkeypatch, train=train, test={"text": ["d", "e"], "label": ["x", "z"]})
    assert load("user/some").texts == ["a", "b"]
    assert load("user/some", "test").texts == ["d"]
    err = capsys.readouterr().err
    assert "1 of 3 train rows of user/some have no text; left out" in err
    assert "1 of 4 train rows of user/some have no label (missing or -1): rows 4, written None; left out" in err
    assert "1 of 2 test rows of user/some have classes that train lacks: z; left out" in err


# ------------------------------------------------------------------ errors of the hub
HUB_CASES: dict[str, tuple[Exception, str]] = {  # tests/models/test_models.py has those of models
    "gated": (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), r"gated.*hf auth login"),
    "revision": (DatasetNotFoundError("Revision 'v9' doesn't exist for 'x'."), r"no revision 'v9'.*--dataset_revision"),
    "unknown": (DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub."), r"on the hub.*Did you mean"),
    "script": (RuntimeError("Dataset scripts are no longer supported, but found x.py"), r"_revision refs/convert"),
    "no data": (DataFilesNotFoundError("No (supported) data files found in x"), r"cannot be read\. No \(supp"),
    "configuration": (ValueError("BuilderConfig 'y' not found. Available: ['z']"), r":<config>.*\['z'\]"),
    "any other": (ZeroDivisionError("division"), r"ZeroDivisionError"),
}


@pytest.mark.parametrize("case", HUB_CASES)
def test_error_of_the_hub(case, monkeypatch):
    error, message = HUB_CASES[case]
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(UserError, match=message) as raised:
        load("dair-ai/emotions", dataset_revision="v9")
    assert raised.value.__cause__ is error  # --debug shows it


def test_full_disk_is_not_disguised(monkeypatch):
    error = DatasetGenerationError("An error")
    error.__cause__ = OSError(28, "No space left on device")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(OSError, match="No space left"):
        load("emotion")


def test_offline_hub_without_a_stub():
    """The library's own exception under HF_HUB_OFFLINE, which conftest.py sets."""
    with pytest.raises(UserError, match=r"Dataset nobody/nothing .*hub cannot be reached"):
        load("nobody/nothing")


@pytest.mark.parametrize(("key", "missing"), [("emotion", "test"), ("sst2", "validation"), ("imdb", "train")])
def test_split_absent_on_the_hub(key, missing, monkeypatch):
    present = [split for split in ("train", "validation", "test") if split != missing]
    stub_hub(monkeypatch, **{split: {"text": ["a"], "sentence": ["a"], "label": [0]} for split in present})
    with pytest.raises(UserError, match=f"no split {missing!r}; splits: {', '.join(present)}"):
        load(key, dataset_revision="refs/convert/parquet")


# ------------------------------------------------------------------ local copies of hub datasets
def test_errors_of_copies(tmp_path):
    with pytest.raises(UserError, match=r"No copy .*emotion/train\.parquet is missing"):
        load("emotion", copies=tmp_path / "elsewhere")
    for name in ("emotion", "docstrings/library", str(tmp_path)):
        with pytest.raises(UserError, match="--dataset_revision main needs the hub"):
            load(name, copies=tmp_path, dataset_revision="main")


def test_test_rows_are_taken_from_train_where_that_is_asked_for(tmp_path, capsys):
    write_parquet(tmp_path / "user__news" / "train.parquet", {"text": list("abcd"), "topic": ["x", "y"] * 2})
    assert load("user/news", "all", tmp_path, label_column="topic").label_names == ["x", "y"]
    columns = {"text": [f"b'text {n}'" for n in range(40)], "toxicity_human": [1 + n % 9 / 2 for n in range(40)]}
    write_parquet(tmp_path / "toxigen" / "train.parquet", columns)
    with pytest.raises(UserError, match=r"no split 'test'; splits: train\. Add a split 'test', or set --divide_train"):
        load("toxigen", copies=tmp_path)
    assert len(load("toxigen", "all", tmp_path).texts) == 40, "a copy need not be whole"
    parts = [load("toxigen", split, tmp_path, divide_train=True) for split in ("train", "test")]
    assert [len(part.texts) for part in parts] == [28, 12] and parts[0].is_regression
    assert not set(parts[0].texts) & set(parts[1].texts)
    assert "seeded 70/30" in capsys.readouterr().out
    for split in ("train", "test"):
        write_labels(tmp_path / "emotion" / f"{split}.parquet", list(range(6)) * 3, split)
    found = load("emotion", "test", tmp_path, divide_train=True)
    assert all(text.startswith("train") for text in found.texts), "not its own test"
