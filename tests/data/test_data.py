"""Datasets: the known ones on made-up rows in their own column schema, the user's own files, and every error.

The rows of a known dataset lie in a folder with the file names of its repository; they go through the same loader, in
which only the hub id is replaced by that folder.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, List, Value
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from utils.data.load import LabelledTexts, load_splits, load_texts
from utils.data.splits import leaked_share, paper_split, seeded_split, stratified_rows
from utils.data.table import DATASETS, SPECS, DatasetSpec
from utils.script import ROOT, UserError
from utils.settings import Data, Run

LOAD_DATASET = datasets.load_dataset
TEXT, NUMBER = Value("string"), Value("int64")


Split = Literal["train", "test", "all"]


def load(name: str | Path, split: Split = "train", copies: Path | None = None, **options: Any) -> LabelledTexts:
    return load_texts(Data(str(name), **options), Run(datasets_dir=copies), split)


# ------------------------------------------------------------------ the known datasets
@dataclass(frozen=True)
class Repository:
    """Columns, files and class names of a dataset's repository, as far as they are published."""

    columns: str  # names; of texts, or behind a colon the kind
    files: dict[str, str]
    classes: tuple[str, ...] = ()  # of the label
    hidden: tuple[str, ...] = ()  # splits whose labels are -1 or empty
    configs: tuple[str, ...] = ()  # the first is the one asked for

    @property
    def kinds(self) -> dict[str, Any]:
        kinds = {"text": TEXT, "int": NUMBER, "float": Value("float64"), "class": ClassLabel(names=list(self.classes))}
        kinds["choices"] = {"label": List(TEXT), "text": List(TEXT)}
        pairs = (column.partition(":") for column in self.columns.split())
        return {name: kinds[kind or "text"] for name, _, kind in pairs}


def in_folder(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"{folder}/{split}-00000-of-00001.parquet" for split in splits}


THREE = in_folder("data", "train", "validation", "test")
# fmt: off
REPOSITORIES = {
    "Bhuvaneshwari/intent_classification": Repository("text intent",
        {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"},
        tuple(f"Intent {number:02}" for number in range(12))),
    "marksverdhei/clickbait_title_classification": Repository("title clickbait:int", {"train": "clickbait_title.csv"}),
    "sst2": Repository("idx:int sentence label:class", THREE, ("negative", "positive"), hidden=("test",)),
    "legacy-datasets/banking77": Repository("text label:class", in_folder("data", "train", "test"),
        tuple(f"intent_{number}" for number in range(77))),
    "PriyaPatel/Bias_identification": Repository("context bias_type:int", THREE),
    "emotion": Repository("text label:class", in_folder("split", "train", "validation", "test"),
        ("sadness", "joy", "love", "anger", "fear", "surprise"), configs=("split", "unsplit")),
    "ucirvine/sms_spam": Repository("sms label:class", in_folder("plain_text", "train"), ("ham", "spam"),
        configs=("plain_text",)),
    "medical": Repository("dr_id:int question_1 question_2 label:class", in_folder("data", "train"), ("0", "1")),
    "rotten_tomatoes": Repository("text label:class",
        {split: f"{split}.parquet" for split in ("train", "validation", "test")}, ("neg", "pos")),
    "common_sense": Repository("id question question_concept choices:choices answerKey", THREE, tuple("ABCDE"),
        hidden=("test",)),
    "climatebert/climate_sentiment": Repository("text label:class", in_folder("data", "train", "test"),
        ("risk", "neutral", "opportunity")),
    "imdb": Repository("text label:class", in_folder("plain_text", "train", "test", "unsupervised"), ("neg", "pos"),
        hidden=("unsupervised",), configs=("plain_text",)),
    "wiki_toxic": Repository("id comment_text label:int",
        {split: f"default/{split}/0000.parquet" for split in ("train", "validation", "test", "balanced_train")}),
    "toxigen": Repository("text target_group toxicity_ai:float toxicity_human:float",
        in_folder("annotated", "train", "test"), configs=("annotated", "annotations", "train", "prompts")),
    "bias_in_bios": Repository("hard_text profession:int gender:int", in_folder("data", "train", "test", "dev")),
    "amazon_polarity": Repository("label:class title content", in_folder("amazon_polarity", "train", "test"),
        ("negative", "positive")),
    "snli": Repository("premise hypothesis label:class", in_folder("plain_text", "train", "validation", "test"),
        ("entailment", "neutral", "contradiction")),
    "DBPedia_Classes": Repository("text l1 l2 l3",
        {"train": "DBPEDIA_train.csv", "validation": "DBPEDIA_val.csv", "test": "DBPEDIA_test.csv"},
        tuple(f"Kind{number}" for number in range(9))),
    "Topic_Classification": Repository("article_text topic", {"train": "topic_classification.csv"},
        ("art", "law", "music", "sport")),
}
# fmt: on


def num_classes(spec: DatasetSpec) -> int:
    return len(REPOSITORIES[spec.key].classes) if spec.num_classes is None else spec.num_classes


def num_rows(spec: DatasetSpec) -> int:
    return 10 * max(num_classes(spec), 2)


def cell(spec: DatasetSpec, name: str, kind: Any, split: str, row: int) -> Any:
    """A made-up cell: its column, its split (none for the intents: there all files are the same), and its row."""
    repository = REPOSITORIES[spec.key]
    if name == spec.label_column:
        number = row % max(num_classes(spec), 1)
        if split in repository.hidden or (spec.key == "snli" and row >= num_rows(spec) - 3):
            return "" if kind == TEXT else -1
        if kind == Value("float64"):
            return 1 + row / 7
        return repository.classes[number] if kind == TEXT else number
    if spec.key == "Bhuvaneshwari/intent_classification":
        return f"{name} {row}"
    if name == "question_1":
        return f"Question {row // 2}?" if row % 2 else f" question  {row // 2}? "
    if name == "choices":
        return {"label": list("ABCDE"), "text": [f"choice {number} of {split} {row}" for number in range(5)]}
    return f"{name} {split} {row}" if kind == TEXT else float(row) if kind == Value("float64") else row


def expected_text(spec: DatasetSpec, split: str, row: int) -> str:
    """The complete text of a made-up row, written out per dataset where it is more than one column."""
    if spec.key == "medical":
        first = f"Question {row // 2}?" if row % 2 else f" question  {row // 2}? "
        return f"{first} question_2 {split} {row}"
    if spec.key == "snli":
        return f"premise {split} {row} hypothesis {split} {row}"
    if spec.key == "common_sense":
        choices = [f"({number}) choice {number} of {split} {row}" for number in range(5)]
        return f"question {split} {row} {' '.join(choices)}"
    if spec.key == "Bhuvaneshwari/intent_classification":
        return f"text {row}"
    return f"{spec.text_template.strip('{}')} {split} {row}"


def made_up_columns(spec: DatasetSpec, split: str) -> dict[str, list[Any]]:
    kinds = REPOSITORIES[spec.key].kinds
    return {name: [cell(spec, name, kind, split, row) for row in range(num_rows(spec))] for name, kind in kinds.items()}


def write_repository(folder: Path, spec: DatasetSpec) -> None:
    repository = REPOSITORIES[spec.key]
    for split, file in repository.files.items():
        columns = made_up_columns(spec, split)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            write_csv(path, list(columns), list(zip(*columns.values(), strict=True)))
        else:
            rows = datasets.Dataset.from_dict(columns, features=datasets.Features(repository.kinds))
            rows.to_parquet(path)
    if repository.configs:
        files = [f"  - split: {split}\n    path: {file}\n" for split, file in repository.files.items()]
        wanted, *others = (f"- config_name: {config}\n  data_files:\n" for config in repository.configs)
        configs = wanted + "".join(files) + "".join(other + files[0] for other in others)  # these have no test split
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def write_csv(path: Path, header: list[str], rows: list[Any], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for spec in SPECS:
        write_repository(folder / spec.hub_id, spec)
    return folder


@pytest.fixture
def calls(hub: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the hub id by its folder, which has no revisions; returns what the library was asked for."""
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        options.pop("revision")
        return LOAD_DATASET(str(hub / path), name, cache_dir=str(hub / ".cache"), **options)

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def expected_classes(spec: DatasetSpec) -> list[str]:
    return list(REPOSITORIES[spec.key].classes or map(str, range(num_classes(spec))))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_known_dataset(spec: DatasetSpec, calls: list[dict[str, Any]]) -> None:
    train, test = load(spec.key), load(spec.hub_id, "test")
    assert calls[0] == calls[1], "key and hub id are one dataset"
    assert calls[0]["name"] == spec.config and calls[0]["revision"] == spec.revision
    rows = num_rows(spec) - 3 * (spec.key == "snli")
    if spec.test_split is None:
        everything = {expected_text(spec, "train", row) for row in range(rows)}
        assert set(train.texts) | set(test.texts) == everything and not set(train.texts) & set(test.texts)
        assert len(test.texts) == pytest.approx(0.3 * rows, abs=1)
    else:
        assert train.texts == [expected_text(spec, "train", row) for row in range(rows)]
        assert test.texts == [expected_text(spec, spec.test_split, row) for row in range(rows)]
    for part in (train, test):
        assert part.label_names == (expected_classes(spec) if spec.num_classes != 0 else [])
        assert part.num_labels == max(num_classes(spec), 1)
        row_of = [int(text.rstrip("? ").split()[-1]) for text in part.texts]
        if spec.num_classes == 0:
            assert part.is_regression and part.labels.dtype == np.float64
            assert part.labels.tolist() == [1 + row / 7 for row in row_of]
        else:
            assert part.labels.dtype == np.int64 and set(part.labels) <= set(range(num_classes(spec)))
            assert part.labels.tolist() == [row % num_classes(spec) for row in row_of]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_copy_is_read_as_from_the_hub(spec: DatasetSpec, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    kinds = dict(REPOSITORIES[spec.key].kinds)
    if spec.class_names:  # without metadata the table's names apply
        kinds[spec.label_column] = TEXT if kinds[spec.label_column] == TEXT else NUMBER
    for split in {"train", "validation", "test"} & set(REPOSITORIES[spec.key].files):
        columns = made_up_columns(spec, split)
        path = tmp_path / spec.key.replace("/", "__") / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(path)
    from_hub, from_copy = (load_splits(Data(spec.key), Run(datasets_dir=folder)) for folder in (None, tmp_path))
    for part in ("train", "test"):
        assert from_copy[part].fingerprint == from_hub[part].fingerprint
        assert from_copy[part].label_names == from_hub[part].label_names
    assert len(calls) == 1, "the copy is read without the hub"


def test_nineteen_datasets_in_the_table() -> None:
    assert len(SPECS) == 19 and set(REPOSITORIES) == {spec.key for spec in SPECS}
    assert all(DATASETS[spec.key] is DATASETS[spec.hub_id] is spec for spec in SPECS)
    assert all(len(spec.class_names) in (0, spec.num_classes) for spec in SPECS)
    for spec in SPECS:  # a short hash is not accepted by the hub
        assert spec.revision is None or len(spec.revision) == 40 or "/" in spec.revision
    assert Counter(spec.split_rule for spec in SPECS)["validation as test"] == 2


def test_nothing_is_executed(calls: list[dict[str, Any]], tmp_path: Path, hub: Path) -> None:
    script = hub / "user" / "scripted" / "scripted.py"
    script.parent.mkdir(parents=True)
    script.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(UserError, match="never executed"):
        load("user/scripted", dataset_revision="main")
    assert not (tmp_path / "executed").exists()
    load("emotion")
    assert not any("trust_remote_code" in call for call in calls)


def test_script_repository_is_read_from_the_converted_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if options["revision"] != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found medical_questions_pairs.py")
        rows = {"text": [f"row {row}" for row in range(10)], "label": [0, 1] * 5}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("user/scripted", "all").texts) == 10


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
    assert "was known with 16,000 and 2,000 rows" in err, "a size other than the table's is told"


def test_paper_split_is_reproduced() -> None:
    train, test = paper_split(5574)
    assert hashlib.md5(str(train.tolist()).encode()).hexdigest() == "43f518ff85b54fad3a48a373ef43b112"
    assert train[:5].tolist() == [4766, 3579, 4837, 2889, 3138]
    assert (len(train), len(test)) == (3901, 1673) and len(set(train) | set(test)) == 5574


def test_own_seed_does_not_move_a_known_split(calls: list[dict[str, Any]]) -> None:
    for key in ("ucirvine/sms_spam", "medical"):
        assert load(key, seed=0).fingerprint == load(key, seed=1).fingerprint


def test_all_is_every_labelled_row(calls: list[dict[str, Any]]) -> None:
    assert len(load("sst2", "all").texts) == 40  # its hidden test split is left out
    assert len(load("imdb", "all").texts) == 40
    assert len(load("wiki_toxic", "all").texts) == 60  # balanced_train is a part of train
    assert len(load("ucirvine/sms_spam", "all").texts) == 20


def test_columns_of_a_known_dataset_can_be_overridden(calls: list[dict[str, Any]]) -> None:
    pair = load("amazon_polarity", text_template="{title}: {content}")
    assert pair.texts[3] == "title train 3: content train 3"
    assert load("amazon_polarity", text_column="title").texts[3] == "title train 3"
    assert load("bias_in_bios", label_column="gender", task="regression").is_regression
    assert load("toxigen", task="classification").num_labels == 20


def test_hub_rows_that_cannot_serve_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = datasets.Dataset.from_dict({"text": ["a", " ", "b", "c"], "label": ["x", "x", "y", None]})
    test = datasets.Dataset.from_dict({"text": ["d", "e"], "label": ["x", "z"]})
    loaded = datasets.DatasetDict(train=train, test=test)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert load("user/some").texts == ["a", "b"]
    assert load("user/some", "test").texts == ["d"]
    err = capsys.readouterr().err
    assert "1 of 3 train rows of user/some have no text; left out" in err
    assert "1 of 4 train rows of user/some have no label (missing or -1): rows 4; left out" in err
    assert "1 of 2 test rows of user/some have classes that train lacks: z; left out" in err


def test_hub_configuration_is_named_behind_a_colon(calls: list[dict[str, Any]], hub: Path) -> None:
    folder = hub / "user" / "two"
    for config, prefix in (("first", "one"), ("second", "two")):
        write_jsonl(folder / f"{config}.jsonl", prefix)
    configs = "".join(f"- config_name: {config}\n  data_files: {config}.jsonl\n" for config in ("first", "second"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"user/two:<config>.*first.*second"):
        load("user/two")
    assert all(text.startswith("two") for text in load("user/two:second").texts)


# ------------------------------------------------------------------ own data
def write_jsonl(path: Path, prefix: str = "text", labels: list[Any] | None = None) -> Path:
    labels = ["no", "yes"] * 10 if labels is None else labels
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"{prefix} {row}", "label": label} for row, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ODD_TEXTS = ["NA", "007", "1e5", "true", 'a "b", c', "line\nbreak", "u\u2028v", "2020-01-01", "nan", " é "]


def write_odd(path: Path) -> Path:
    """The same ten texts, which a type-guessing reader would change, in the format of the suffix."""
    labels = ["no", "yes"] * 5
    if path.suffix == ".csv":
        return write_csv(path, ["text", "label"], list(zip(ODD_TEXTS, labels, strict=True)))
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": ODD_TEXTS, "label": labels}).to_parquet(path)
        return path
    rows = [{"text": text, "label": label} for text, label in zip(ODD_TEXTS, labels, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("\ufeff" + (lines if path.suffix == ".jsonl" else json.dumps(rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_own_file_is_read_letter_by_letter(suffix: str, tmp_path: Path) -> None:
    found = load(write_odd(tmp_path / f"odd{suffix}"), "all")
    assert found.texts == ODD_TEXTS and found.label_names == ["no", "yes"]
    assert found.labels.tolist() == [0, 1] * 5


def test_classes_of_a_parquet_file_keep_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": TEXT, "label": ClassLabel(names=["zebra", "ant"])})
    rows = {"text": list("abcd"), "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "animals.parquet")
    found = load(tmp_path / "animals.parquet", "all")
    assert found.label_names == ["zebra", "ant"] and found.labels.tolist() == [0, 1, 1, 0]


def test_template_joins_columns_and_choices(tmp_path: Path) -> None:
    rows = [{"question": f"Why {n}?", "choices": ["a", "b {x}"], "label": n % 2} for n in range(4)]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load(path, "all", text_template="Q: {question} A: {choices}.")
    assert found.texts[1] == "Q: Why 1? A: (0) a (1) b {x}."
    assert load(path, "all", text_template="{{1}} {question}").texts[1] == "{1} Why 1?"
    typed = r"{question}\n\t{question}"  # as a shell passes it on
    assert load(path, "all", text_template=typed).texts[1] == "Why 1?\n\tWhy 1?"


@pytest.mark.parametrize(("rows", "train"), [(2, 1), (3, 2), (7, 4), (10, 7), (11, 7), (13, 9), (14, 9), (101, 70)])
def test_sizes_of_70_30(rows: int, train: int, tmp_path: Path) -> None:
    """The test side is rounded up: of 11 rows it gets 4."""
    path = write_jsonl(tmp_path / "rows.jsonl", labels=[row + 0.5 for row in range(2 * rows)])
    found = load_splits(Data(str(path)), Run())
    num_test = -(-6 * rows // 10)
    assert [len(part.texts) for part in found.values()] == [2 * rows - num_test, num_test]
    for split in (seeded_split(np.arange(rows) % 2, 0), paper_split(rows)):
        assert [len(part) for part in split] == [train, rows - train]
        assert sorted(np.concatenate(split)) == list(range(rows))


def test_paper_split_is_that_of_the_library() -> None:
    for num_rows in (2, 5, 11, 100, 1234):
        split = datasets.Dataset.from_dict({"row": range(num_rows)}).train_test_split(0.3, seed=42)
        assert [part.tolist() for part in paper_split(num_rows)] == [
            split[name]["row"][:] for name in ("train", "test")
        ]


def test_columns_are_guessed_only_where_evident(tmp_path: Path) -> None:
    rows = [[n, f"review {n}", n % 2] for n in range(10)]
    path = write_csv(tmp_path / "reviews.csv", ["id", "review", "labels"], rows)
    assert load(path, "all").texts[0] == "review 0"
    rows = [[f"title {n}", f"review {n}", n % 2] for n in range(10)]
    path = write_csv(tmp_path / "two.csv", ["title", "review", "labels"], rows)
    with pytest.raises(UserError, match=r"title, review, labels.*--text_column"):
        load(path)
    assert load(path, "all", text_column="review", label_column="labels").texts[0] == "review 0"


def test_own_split_is_stratified_and_seeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["a"] * 70 + ["b"] * 29 + ["c"]
    path = write_jsonl(tmp_path / "sorted.jsonl", labels=labels)
    train, test = load(path), load(path, "test")
    assert (len(train.texts), len(test.texts)) == (70, 30)
    assert not set(train.texts) & set(test.texts)
    assert Counter(train.labels.tolist()) == {0: 49, 1: 20, 2: 1}, "the only row of a class belongs to train"
    assert train.labels.tolist() != sorted(train.labels.tolist())
    assert train.fingerprint == load(path).fingerprint != load(path, seed=1).fingerprint
    assert sorted(train.texts + test.texts) == sorted(load(path, "all").texts)
    assert "70 train and 30 test texts, 3 classes, split 70/30 by seed 0" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_max_samples_is_stratified_shuffled_and_deterministic(
    split: Literal["train", "test", "all"], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "sorted.jsonl", labels=["a"] * 150 + ["b"] * 50)
    found = load(path, split, max_samples=20)
    assert Counter(found.labels.tolist()) == {0: 15, 1: 5}
    assert found.labels.tolist() != sorted(found.labels.tolist())
    assert set(found.texts) <= set(load(path, split).texts) and len(set(found.texts)) == 20
    again = load(path, split, max_samples=20)
    assert again.texts == found.texts and again.fingerprint == found.fingerprint
    assert load(path, split, max_samples=20, seed=1).texts != found.texts
    assert load(path, split, max_samples=1000).fingerprint == load(path, split).fingerprint
    fewer = {name: len(load(path, name, max_samples=20, max_test_samples=6).texts) for name in ("train", "test")}
    assert fewer == {"train": 20, "test": 6}


def test_sample_of_rows_leaves_out_no_class_that_fits() -> None:
    classes = np.repeat([0, 1, 2], [990, 9, 1])
    for num in (3, 10, 500, 999, 1000):
        rows = stratified_rows(classes, num, seed=0)
        assert len(set(rows)) == num and set(classes[rows]) == {0, 1, 2}
        assert Counter(classes[rows].tolist())[0] == pytest.approx(0.99 * num, abs=2)
    assert len(stratified_rows(classes, 2, seed=0)) == 2
    equal = stratified_rows(np.repeat(np.arange(10), 11), 55, seed=0) // 11
    assert set(Counter(equal.tolist()).values()) == {5, 6}


def test_leaked_share() -> None:
    assert leaked_share(["a", "b"], ["b", "c", "d", "b"]) == 0.5 and leaked_share([], ["a"]) == 0


def test_fingerprint_covers_texts_and_labels(tmp_path: Path) -> None:
    found = load(write_jsonl(tmp_path / "a.jsonl"), "all")
    digest = hashlib.sha256("".join(f"{text}\0" for text in found.texts).encode() + found.labels.tobytes())
    assert found.fingerprint == digest.hexdigest()[:16]
    assert load(write_jsonl(tmp_path / "b.jsonl", labels=["yes", "no"] * 10), "all").fingerprint != found.fingerprint


def test_regression_is_found_and_can_be_forced(tmp_path: Path) -> None:
    scores = write_csv(tmp_path / "scores.csv", ["text", "label"], [[f"t {n}", n / 4 - 1] for n in range(20)])
    train, test = load(scores), load(scores, "test")
    assert train.is_regression and train.num_labels == 1 and train.labels.dtype == np.float64
    assert (len(train.texts), len(test.texts)) == (14, 6)
    assert -1.0 in [*train.labels, *test.labels], "-1 is a target like any other"
    assert load(scores, max_samples=5).labels.tolist() == load(scores, max_samples=5).labels.tolist()
    stars = write_jsonl(tmp_path / "stars.jsonl", labels=[1, 2, 3.0, 10] * 5)
    assert load(stars).label_names == ["1", "2", "3", "10"], "whole numbers are classes, in numeric order"
    assert load(stars, task="regression").labels.max() == 10.0
    assert load(scores, "all", task="classification").num_labels == 19


@pytest.mark.parametrize(("factor", "shift"), [(1, 1e4), (1, -1e4), (1e14, 0), (1e-14, 0)])
def test_targets_within_the_range_are_taken_as_they_are(factor: float, shift: float, tmp_path: Path) -> None:
    numbers = [(n / 4 + 0.1) * factor + shift for n in range(20)]
    found = load(write_jsonl(tmp_path / "rows.jsonl", labels=numbers), "all", task="regression")
    assert found.labels.tolist() == numbers


def test_test_targets_may_be_all_equal(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", labels=[0.5, 1.5, 2.0, 3.0])
    write_jsonl(tmp_path / "test.jsonl", labels=[1e9 + 0.5] * 3)
    assert load(tmp_path, "test").labels.tolist() == [1e9 + 0.5] * 3


def test_folder_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "data" / "train-00000-of-00002.jsonl", "first")
    write_jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", "second")
    write_jsonl(tmp_path / "data" / "test.jsonl", "held out")
    write_jsonl(tmp_path / "data" / "dev.jsonl", "validation")
    assert [load(tmp_path).texts[row] for row in (0, 20)] == ["first 0", "second 0"]
    assert load(tmp_path, "test").texts[0] == "held out 0"
    assert len(load(tmp_path, "all").texts) == 80
    (tmp_path / "data" / "test.jsonl").unlink()
    assert load(tmp_path, "test").texts[0] == "validation 0", "what is held out need not be split off"
    assert "validation serves as the test split" in capsys.readouterr().out
    write_jsonl(tmp_path / "data" / "test.jsonl", "hidden", [-1] * 20)
    assert load(tmp_path, "test").texts[0] == "validation 0", "a test split without labels cannot be scored"


def test_docstring_task(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: dict[str, dict[str, Any]] = {
        "kind": {"train": (["a", "b", "c"], ["x", "y", "x"]), "test": (["d", "e"], ["y", "x"])},
        "lines": {"train": (["a", "b"], [1.5, 2.25]), "test": (["c", "d"], [0.5, 3.0])},
    }
    stub = SimpleNamespace(load_task=tasks.__getitem__)
    monkeypatch.setitem(sys.modules, "utils.data.docstrings", stub)
    assert load("docstrings/kind").labels.tolist() == [0, 1, 0]
    assert load("docstrings/kind", "test").label_names == ["x", "y"]
    assert load("docstrings/lines").is_regression
    assert load("docstrings/lines", "all").labels.tolist() == [1.5, 2.25, 0.5, 3.0]


# ------------------------------------------------------------------ errors
def labelled(*labels: Any) -> Callable[[Path], Path]:
    return lambda folder: write_jsonl(folder / "rows.jsonl", labels=list(labels))


def in_splits(**labels: list[Any] | None) -> Callable[[Path], Path]:
    """A folder with a file of these labels per split."""

    def write(folder: Path) -> Path:
        for split, of_split in labels.items():
            write_jsonl(folder / "own" / f"{split}.jsonl", labels=of_split)
        return folder / "own"

    return write


FAR = [1e7 + n / 4 for n in range(10)]
# fmt: off
OWN_ERRORS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "missing file": (lambda folder: folder / "none.csv", {}, r"no file or folder .*none\.csv"),
    "empty folder": (lambda folder: folder, {}, r"No data file in the folder"),
    "file of no split": (in_splits(train=None, more=None), {},
        r"more\.jsonl belongs to no split, while .*train\.jsonl does"),
    "missing text column": (labelled(0, 1), {"text_column": "txet"}, r"no column 'txet'; columns: text, label"),
    "missing label column": (labelled(0, 1), {"label_column": "y"}, r"no column 'y'; columns: text, label.*--label"),
    "missing template column": (labelled(0, 1), {"text_template": "{text} {b}"}, r"no column 'b'.*--text_template"),
    "template without columns": (labelled(0, 1), {"text_template": "text"}, r"must name columns in braces"),
    "template with a format": (labelled(0, 1), {"text_template": "{text!r}"}, r"must name columns in braces"),
    "malformed template": (labelled(0, 1), {"text_template": "{text"}, r"malformed"),
    "column and template": (labelled(0, 1), {"text_template": "{text}", "text_column": "text"}, r"exclude each other"),
    "single class": (labelled("yes", "yes", "yes"), {}, r"all 'yes'; at least two classes"),
    "too many classes": (labelled(*[*range(5001)] * 2), {}, r"of 5,001 classes; .* up to 5,000 .*regression"),
    "all labels missing": (labelled(None, "", -1), {}, r"3 of 3 train rows of .* have no label \(missing or -1\)"),
    "class -1 next to one other": (labelled(-1, 1, 1), {}, r"all '1'.*name it in words"),
    "several labels": (labelled([1, 2], [1]), {}, r"labels of .* are lists"),
    "class that train lacks": (in_splits(train=None, test=["no", "maybe"]), {},
        r"1 of 2 test rows .* classes that train lacks: maybe"),
    "targets of words": (labelled("a", "b"), {"task": "regression"}, r"train row 1, is not a number: 'a'"),
    "equal targets": (labelled(1.5, 1.5, 1.5), {}, r"targets .* all equal"),
    "equal targets in the sample": (labelled(*[0.5] * 30, 1.5), {"max_samples": 2}, r"all equal.* --max_samples"),
    "targets far from 0": (labelled(*FAR), {},
        r"run from 1000000.* 100,000 times as large: rescale the column, or subtract a constant such as 1000000"),
    "test targets far from 0": (in_splits(train=[0.5, 1.5, 2.0], test=FAR), {}, r"The test targets .* subtract a"),
    "targets near the largest": (labelled(-1.7e308, 1.7e308, 0.5), {}, r"within 1e-15 and 1e\+15.*rescale the column"),
    "tiny targets": (labelled(*(n * 1e-200 for n in range(10))), {}, r"within 1e-15 and 1e\+15.*rescale the column"),
    "subnormal targets": (labelled(5e-324, 1.5e-323, 0.0), {}, r"within 1e-15 and 1e\+15.*rescale the column"),
    "one row": (labelled("yes"), {}, r"1 labelled rows"),
    "lone surrogate": (labelled(*["no", "yes"] * 3), {"text_template": "{text}\ud800"}, r"not valid Unicode"),
    "train absent": (in_splits(test=None), {}, r"no split 'train'; splits: test"),
}
# fmt: on


@pytest.mark.parametrize("case", OWN_ERRORS)
def test_error_of_own_data(case: str, tmp_path: Path) -> None:
    make, options, message = OWN_ERRORS[case]
    with pytest.raises(UserError, match=message):
        load(make(tmp_path), **options)


def test_minus_one_is_never_dropped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(write_jsonl(tmp_path / "rows.jsonl", labels=[-1, 0, 1, 0, 1]), "all")
    assert found.label_names == ["0", "1"] and len(found.texts) == 4
    assert "1 of 5 train rows" in (err := capsys.readouterr().err) and "have no label (missing or -1)" in err


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl")

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(UserError, match=r"rows\.jsonl cannot be read \(Permission denied\)"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("emotoin", r"no dataset 'emotoin'\. Did you mean emotion\?.*docstrings/<task>"),
        ("banking77", r"Did you mean legacy-datasets/banking77\?"),
        ("docstrings/no_such_task", r"no_such_task"),
    ],
)
def test_unknown_key_shows_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


def http_error(kind: type[HfHubHTTPError], status: int = 404) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} Client Error: {kind.__name__}", response=response)


# fmt: off
HUB_CASES: dict[str, tuple[Exception, str]] = {
    "gated": (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), r"gated.*hf auth login"),
    "gated, raw": (http_error(GatedRepoError, 403), r"gated.*datasets/dair-ai/emotion.*hf auth login"),
    "no token": (LocalTokenNotFoundError("Token is required"), r"needs a login.*hf auth login"),
    "revision": (DatasetNotFoundError("Revision 'v9' doesn't exist for dataset 'x' on the Hub."),
        r"no revision 'v9'.*--dataset_revision"),
    "revision, raw": (http_error(RevisionNotFoundError), r"no revision 'v9'.*--dataset_revision"),
    "unknown": (DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."),
        r"does not exist on the hub.*Did you mean"),
    "unknown, raw": (http_error(RepositoryNotFoundError, 401), r"does not exist on the hub"),
    "offline, raw": (OfflineModeIsEnabled("offline mode is enabled"), r"hub cannot be reached.*HF_HUB_OFFLINE"),
    "no data": (DataFilesNotFoundError("No (supported) data files found in x"), r"cannot be read\. No \(supp"),
    "configuration": (ValueError("BuilderConfig 'y' not found. Available: ['z']"), r":<config>.*\['z'\]"),
}
# fmt: on


@pytest.mark.parametrize("case", HUB_CASES)
def test_error_of_the_hub(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message = HUB_CASES[case]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=message):
        load("dair-ai/emotions", dataset_revision="v9")


def test_other_errors_are_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise DatasetGenerationError("An error occurred") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full_disk)
    with pytest.raises(OSError, match="No space left"):
        load("emotion")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="ZeroDivisionError") as raised:
        load("emotion")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)  # what --debug shows


def test_offline_hub_without_a_stub(tmp_path: Path) -> None:
    """The library's own exception under HF_HUB_OFFLINE, which conftest.py sets."""
    with pytest.raises(UserError, match=r"Dataset nobody/nothing .*hub cannot be reached"):
        load("nobody/nothing")


@pytest.mark.parametrize(("key", "missing"), [("emotion", "test"), ("sst2", "validation"), ("imdb", "train")])
def test_split_absent_on_the_hub(key: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"], "sentence": ["a"], "label": [0]})
    present = [split for split in ("train", "validation", "test") if split != missing]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(dict.fromkeys(present, rows)))
    with pytest.raises(UserError, match=f"no split {missing!r}; splits: {', '.join(present)}"):
        load(key)


# ------------------------------------------------------------------ local copies of hub datasets
def write_copy(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)


def test_copy_outside_the_table(tmp_path: Path) -> None:
    write_copy(tmp_path / "user__news" / "train.parquet", {"text": list("abcd"), "topic": ["x", "y"] * 2})
    assert load("user/news", "all", tmp_path, label_column="topic").label_names == ["x", "y"]


def test_errors_of_copies(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "elsewhere"):
        with pytest.raises(UserError, match=r"No copy of emotion .*emotion/train\.parquet is missing; copies: none"):
            load("emotion", copies=folder)
    with pytest.raises(UserError, match="--dataset_revision main"):
        load("emotion", copies=tmp_path, dataset_revision="main")
    write_copy(tmp_path / "sst2" / "train.parquet", {"text": ["a"], "label": [0]})
    write_copy(tmp_path / "sst2" / "validation.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(UserError, match=r"sst2 has no column 'sentence'; columns: text, label"):
        load("sst2", copies=tmp_path)
    with pytest.raises(UserError, match=r"No copy of emotion .*copies: sst2\."):
        load("emotion", copies=tmp_path)


def test_test_rows_are_taken_from_train_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"text": [f"b'text {n}'" for n in range(40)], "toxicity_human": [1 + n % 9 / 2 for n in range(40)]}
    write_copy(tmp_path / "toxigen" / "train.parquet", columns)
    with pytest.raises(UserError, match=r"no split 'test'; splits: train\. Add one called test, .*or --divide_train"):
        load("toxigen", copies=tmp_path)
    assert len(load("toxigen", "all", tmp_path).texts) == 40, "a copy need not be whole"
    parts = [load("toxigen", split, tmp_path, divide_train=True) for split in ("train", "test")]
    assert [len(part.texts) for part in parts] == [28, 12] and parts[0].is_regression
    assert not set(parts[0].texts) & set(parts[1].texts)
    assert "seeded 70/30" in capsys.readouterr().out
    for split in ("train", "test"):
        columns = {"text": [f"{split} {n}" for n in range(18)], "label": list(range(6)) * 3}
        write_copy(tmp_path / "emotion" / f"{split}.parquet", columns)
    found = load("emotion", "test", tmp_path, divide_train=True)
    assert all(text.startswith("train") for text in found.texts), "not its own test"
    pairs = {"question_1": [f"Q {n // 2}?" for n in range(40)], "question_2": [f"other {n}" for n in range(40)]}
    write_copy(tmp_path / "medical" / "train.parquet", {**pairs, "label": [0, 1] * 20})
    divided, plain = (load("medical", copies=tmp_path, divide_train=flag) for flag in (True, False))
    assert divided.fingerprint == plain.fingerprint, "divided by question anyway"


@pytest.mark.slow
def test_table_is_printed_without_network() -> None:
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "utils.data.load"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 20 and lines[0].split()[0] == "key"
    emotion = next(line for line in lines if line.startswith("emotion "))
    for fact in ("dair-ai/emotion", "6", "16,000", "2,000", "own test", "other"):
        assert fact in emotion
