"""The known datasets on made-up rows in their own column schema, the hub's errors, and local copies."""

from collections import Counter
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, List, Value
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

from tests.data.inputs import load, write_labels, write_parquet
from utils.data.load import LabelledTexts
from utils.data.splits import paper_split
from utils.data.table import DATASETS, SPECS, DatasetSpec, table
from utils.script import UserError

TEXT = Value("string")
TEXT_LABELS = ("Bhuvaneshwari/intent_classification", "common_sense", "DBPedia_Classes", "Topic_Classification")
HIDDEN = {"sst2": "test", "common_sense": "test", "imdb": "unsupervised"}  # splits with labels that are -1 or empty


def class_names(spec: DatasetSpec) -> list[str]:
    if spec.class_names or spec.key not in TEXT_LABELS:
        return list(spec.class_names or map(str, range(spec.num_classes or 0)))
    return [f"Kind {number:02}" for number in range(spec.num_classes or 4)]


def num_rows(spec: DatasetSpec) -> int:
    return 10 * max(len(class_names(spec)), 2)


def kinds_of(spec: DatasetSpec) -> dict[str, Any]:
    """The columns of the table of datasets, and two more."""
    texts = [name for _, name, _, _ in Formatter().parse(spec.text_template) if name]
    kinds = dict.fromkeys([*texts, "more"], TEXT) | {"number": Value("int64")}
    if "choices" in kinds:
        kinds["choices"] = {"label": List(TEXT), "text": List(TEXT)}
    label = ClassLabel(names=list(spec.class_names)) if spec.class_names else Value("int64")
    label = TEXT if spec.key in TEXT_LABELS else Value("float64") if spec.num_classes == 0 else label
    return {**kinds, spec.label_column: label}


def cell(spec: DatasetSpec, name: str, split: str, row: int) -> Any:
    """A made-up cell that names its column, its split (not for the intents: their files are equal) and its row."""
    kind, names = kinds_of(spec)[name], class_names(spec)
    if name == spec.label_column:
        if split == HIDDEN.get(spec.key) or (spec.key == "snli" and row >= num_rows(spec) - 3):
            return "" if kind == TEXT else -1
        if not names:
            return 1 + row / 7
        return names[row % len(names)] if kind == TEXT else row % len(names)
    if name == "question_1":
        return f"Question {row // 2}?" if row % 2 else f" question  {row // 2}? "
    if name == "choices":
        return {"label": list("ABCDE"), "text": [f"choice {number} of {split} {row}" for number in range(5)]}
    split = "" if spec.key == "Bhuvaneshwari/intent_classification" else split
    return f"{name} {split} {row}" if kind == TEXT else row


def expected_text(spec: DatasetSpec, split: str, row: int) -> str:
    """The complete text of a made-up row, written out for datasets that join several columns."""
    if spec.key == "medical":
        return f"{cell(spec, 'question_1', split, row)} question_2 {split} {row}"
    if spec.key == "snli":
        return f"premise {split} {row} hypothesis {split} {row}"
    if spec.key == "common_sense":
        choices = [f"({number}) choice {number} of {split} {row}" for number in range(5)]
        return f"question {split} {row} {' '.join(choices)}"
    return cell(spec, spec.text_template.strip("{}"), split, row)


def made_up(spec: DatasetSpec) -> datasets.DatasetDict:
    """The splits of a dataset's repository."""
    held_out = {spec.test_split, "validation", HIDDEN.get(spec.key, "validation")} if spec.test_split else set()
    made, kinds = {}, kinds_of(spec)
    for split in ["train", *sorted(map(str, held_out))]:
        columns = {name: [cell(spec, name, split, row) for row in range(num_rows(spec))] for name in kinds}
        made[split] = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    return datasets.DatasetDict(made)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the hub by made-up rows; returns the requests that the library received."""
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        return made_up(DATASETS[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_known_dataset(spec: DatasetSpec, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    train, test = load(spec.key), load(spec.hub_id, "test")
    asked = {"path": spec.hub_id, "name": spec.config, "revision": spec.revision, "data_files": spec.data_files}
    assert calls == [asked, asked], "key and hub id are one dataset"
    rows = num_rows(spec) - 3 * (spec.key == "snli")
    if spec.test_split is None:
        everything = {expected_text(spec, "train", row) for row in range(rows)}
        assert set(train.texts) | set(test.texts) == everything and not set(train.texts) & set(test.texts)
        assert len(test.texts) == pytest.approx(0.3 * rows, abs=1)
    else:
        assert train.texts == [expected_text(spec, "train", row) for row in range(rows)]
        assert test.texts == [expected_text(spec, spec.test_split, row) for row in range(rows)]
    for split, of_split in made_up(spec).items():
        write_parquet(tmp_path / spec.key.replace("/", "__") / f"{split}.parquet", of_split.to_dict())
    for split, part in (("train", train), ("test", test)):
        assert part.label_names == class_names(spec)
        row_of = [int(text.rstrip("? ").split()[-1]) for text in part.texts]
        if spec.num_classes == 0:
            assert part.labels.dtype == np.float64 and part.labels.tolist() == [1 + row / 7 for row in row_of]
        else:
            assert part.labels.tolist() == [row % part.num_labels for row in row_of]
        copy = load(spec.key, split, tmp_path)  # without metadata: the classes have the names of the table
        assert copy.fingerprint == part.fingerprint
        assert copy.label_names == part.label_names or not spec.class_names
    assert len(calls) == 2, "the copy is read without the hub"


def test_nineteen_datasets_in_the_table() -> None:
    assert len(SPECS) == len({spec.key for spec in SPECS}) == 19
    assert all(DATASETS[spec.key] is DATASETS[spec.hub_id] is spec for spec in SPECS)
    assert all(len(spec.class_names) in (0, spec.num_classes) for spec in SPECS)
    for spec in SPECS:  # a short hash is not accepted by the hub
        assert spec.revision is None or len(spec.revision) == 40 or "/" in spec.revision
    assert Counter(spec.split_rule for spec in SPECS)["validation as test"] == 2
    lines = table().splitlines()
    assert len(lines) == 20 and lines[0].split()[0] == "key"
    emotion = next(line for line in lines if line.startswith("emotion "))
    assert all(fact in emotion for fact in ("dair-ai/emotion", "6", "16,000", "2,000", "own test", "other"))


def stub_hub(monkeypatch: pytest.MonkeyPatch, **splits: dict[str, list[Any]]) -> None:
    loaded = datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()})

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if options["revision"] != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found medical_questions_pairs.py")
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_script_repository_is_read_from_the_converted_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_hub(monkeypatch, train={"text": [f"row {row}" for row in range(10)], "label": [0, 1] * 5})
    assert len(load("user/scripted", "all").texts) == 10
    with pytest.raises(UserError, match="never executed"):
        load("user/scripted", dataset_revision="main")


def test_medical_keeps_a_question_on_one_side(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
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
    order = paper_split(num_rows(DATASETS["medical"]))[0]
    assert paper_train.texts == [expected_text(DATASETS["medical"], "train", row) for row in order]


def test_leak_of_the_intents_is_found(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    load("Bhuvaneshwari/intent_classification")
    out, err = capsys.readouterr()
    assert "120 train and 120 test texts, 12 classes, own test, 100.0% of the test texts are also in train" in out
    assert "warning: 100.0% of the test texts" in err
    load("emotion")
    out, err = capsys.readouterr()
    assert "0.0% of the test texts" in out and "of the test texts" not in err
    assert "had 16,000 and 2,000 rows" in err, "a size other than the table's is told"


def test_all_is_every_labelled_row_and_a_seed_moves_no_known_split(calls: list[dict[str, Any]]) -> None:
    assert len(load("sst2", "all").texts) == 40  # its hidden test split is left out
    assert len(load("imdb", "all").texts) == 60
    assert len(load("ucirvine/sms_spam", "all").texts) == 20
    for key in ("ucirvine/sms_spam", "medical"):
        assert load(key, seed=0).fingerprint == load(key, seed=1).fingerprint


def test_columns_of_a_known_dataset_can_be_overridden(calls: list[dict[str, Any]]) -> None:
    pair = load("amazon_polarity", text_template="{more}: {content}")
    assert pair.texts[3] == "more train 3: content train 3"
    assert load("amazon_polarity", text_column="more").texts[3] == "more train 3"
    assert load("bias_in_bios", label_column="number", task="regression").is_regression
    assert load("toxigen", task="classification").num_labels == 20


def test_hub_rows_that_cannot_serve_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"text": ["a", " ", "b", "c"], "label": ["x", "x", "y", None]}
    stub_hub(monkeypatch, train=train, test={"text": ["d", "e"], "label": ["x", "z"]})
    assert load("user/some").texts == ["a", "b"]
    assert load("user/some", "test").texts == ["d"]
    err = capsys.readouterr().err
    assert "1 of 3 train rows of user/some have no text; left out" in err
    assert "1 of 4 train rows of user/some have no label (missing or -1): rows 4; left out" in err
    assert "1 of 2 test rows of user/some have classes that train lacks: z; left out" in err


# ------------------------------------------------------------------ errors of the hub
def raise_from(error: Exception, cause: Exception | None) -> None:
    raise error from cause


HUB_CASES: dict[str, tuple[Exception, str]] = {  # tests/models/test_models.py has those of models
    "gated": (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), r"gated.*hf auth login"),
    "revision": (DatasetNotFoundError("Revision 'v9' doesn't exist for 'x'."), r"no revision 'v9'.*--dataset_revision"),
    "unknown": (DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub."), r"on the hub.*Did you mean"),
    "no data": (DataFilesNotFoundError("No (supported) data files found in x"), r"cannot be read\. No \(supp"),
    "configuration": (ValueError("BuilderConfig 'y' not found. Available: ['z']"), r":<config>.*\['z'\]"),
    "any other": (ZeroDivisionError("division"), r"ZeroDivisionError"),
}


@pytest.mark.parametrize("case", HUB_CASES)
def test_error_of_the_hub(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message = HUB_CASES[case]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: raise_from(error, None))
    with pytest.raises(UserError, match=message) as raised:
        load("dair-ai/emotions", dataset_revision="v9")
    assert raised.value.__cause__ is error  # --debug shows it


def test_full_disk_is_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = OSError(28, "No space left on device")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: raise_from(DatasetGenerationError("An error"), disk))
    with pytest.raises(OSError, match="No space left"):
        load("emotion")


def test_offline_hub_without_a_stub() -> None:
    """The library's own exception under HF_HUB_OFFLINE, which conftest.py sets."""
    with pytest.raises(UserError, match=r"Dataset nobody/nothing .*hub cannot be reached"):
        load("nobody/nothing")


@pytest.mark.parametrize(("key", "missing"), [("emotion", "test"), ("sst2", "validation"), ("imdb", "train")])
def test_split_absent_on_the_hub(key: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present = [split for split in ("train", "validation", "test") if split != missing]
    stub_hub(monkeypatch, **{split: {"text": ["a"], "sentence": ["a"], "label": [0]} for split in present})
    with pytest.raises(UserError, match=f"no split {missing!r}; splits: {', '.join(present)}"):
        load(key, dataset_revision="refs/convert/parquet")


# ------------------------------------------------------------------ local copies of hub datasets
def test_errors_of_copies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No copy of emotion .*emotion/train\.parquet is missing"):
        load("emotion", copies=tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--dataset_revision main"):
        load("emotion", copies=tmp_path, dataset_revision="main")
    for split in ("train", "validation"):
        write_labels(tmp_path / "sst2" / f"{split}.parquet", [0])
    with pytest.raises(UserError, match=r"no column 'sentence'; columns: text, label"):
        load("sst2", copies=tmp_path)


def test_test_rows_are_taken_from_train_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "user__news" / "train.parquet", {"text": list("abcd"), "topic": ["x", "y"] * 2})
    assert load("user/news", "all", tmp_path, label_column="topic").label_names == ["x", "y"]
    columns = {"text": [f"b'text {n}'" for n in range(40)], "toxicity_human": [1 + n % 9 / 2 for n in range(40)]}
    write_parquet(tmp_path / "toxigen" / "train.parquet", columns)
    with pytest.raises(UserError, match=r"no split 'test'; splits: train\. Add a split 'test', .*or --divide_train"):
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
    pairs = {"question_1": [f"Q {n // 2}?" for n in range(40)], "question_2": [f"other {n}" for n in range(40)]}
    write_parquet(tmp_path / "medical" / "train.parquet", {**pairs, "label": [0, 1] * 20})
    divided, plain = (load("medical", copies=tmp_path, divide_train=flag) for flag in (True, False))
    assert divided.fingerprint == plain.fingerprint, "divided by question anyway"
