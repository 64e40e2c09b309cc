"""The user's own data as labelled texts: columns, splits, samples, targets, fingerprints, and every error."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tests.data.inputs import load, write, write_labels
from utils.data.splits import paper_split, seeded_split, stratified_rows
from utils.script import UserError


def test_template_joins_columns_and_choices(tmp_path):
    rows = [{"question": f"Why {n}?", "choices": ["a", "b {x}"], "label": n % 2} for n in range(4)]
    path = write(tmp_path / "quiz.jsonl", "\n".join(map(json.dumps, rows)))
    typed = r"{question}\n\t{question}"  # as a shell passes it on
    expected = {"Q: {question} A: {choices}.": "Q: Why 1? A: (0) a (1) b {x}.", typed: "Why 1?\n\tWhy 1?"}
    for template, text in {**expected, "{{1}} {question}": "{1} Why 1?"}.items():
        assert load(path, "all", text_template=template).texts[1] == text


def test_fingerprint_is_that_of_texts_and_labels(tmp_path):
    found = load(write_labels(tmp_path / "rows.jsonl", ["no", "yes"] * 10), "all")
    digest = hashlib.sha256("".join(f"{text}\0" for text in found.texts).encode() + found.labels.tobytes())
    assert found.fingerprint == digest.hexdigest()[:16] == "19260eadec81441a"
    assert load(write_labels(tmp_path / "other.jsonl", ["yes", "no"] * 10), "all").fingerprint != found.fingerprint


def test_splits_and_samples_stay_those_of_earlier_results():
    train, test = paper_split(5574)
    assert hashlib.md5(str(train.tolist()).encode()).hexdigest() == "43f518ff85b54fad3a48a373ef43b112"
    assert train[:5].tolist() == [4766, 3579, 4837, 2889, 3138]
    assert (len(train), len(test)) == (3901, 1673) and len(set(train) | set(test)) == 5574
    for num_rows in (2, 3, 7, 10, 11, 14, 101, 1234):
        split = datasets.Dataset.from_dict({"row": range(num_rows)}).train_test_split(0.3, seed=42)
        expected = [split[name]["row"][:] for name in ("train", "test")]
        assert [part.tolist() for part in paper_split(num_rows)] == expected
        seeded = seeded_split(np.arange(num_rows) % 2, 0)
        assert [len(part) for part in seeded] == [len(part) for part in expected]  # of 11 rows 4 are for the test
        assert sorted(np.concatenate(seeded)) == list(range(num_rows))
    classes = np.arange(20) ** 2 % 7
    train, test = seeded_split(classes, 5)
    assert train.tolist() == [6, 4, 1, 3, 15, 9, 16, 18, 19, 0, 13, 7, 11, 2]
    assert test.tolist() == [8, 14, 10, 12, 17, 5]
    assert stratified_rows(classes, 6, 1).tolist() == [18, 1, 12, 10, 16, 7]


def test_own_split_is_stratified_and_seeded(tmp_path, capsys):
    path = write_labels(tmp_path / "sorted.jsonl", ["a"] * 70 + ["b"] * 29 + ["c"])
    train, test = load(path), load(path, "test")
    assert (len(train.texts), len(test.texts)) == (70, 30) and not set(train.texts) & set(test.texts)
    assert Counter(train.labels.tolist()) == {0: 49, 1: 20, 2: 1}, "the only row of a class belongs to train"
    assert train.labels.tolist() != sorted(train.labels.tolist())
    assert train.fingerprint == load(path).fingerprint != load(path, seed=1).fingerprint
    assert sorted(train.texts + test.texts) == sorted(load(path, "all").texts)
    assert "70 train and 30 test texts, 3 classes, split 70/30 by seed 0" in capsys.readouterr().out


def test_max_samples_is_stratified_shuffled_and_deterministic(tmp_path):
    path = write_labels(tmp_path / "sorted.jsonl", ["a"] * 150 + ["b"] * 50)
    for split in ("train", "all"):
        found, whole = load(path, split, max_samples=20), load(path, split)
        assert Counter(found.labels.tolist()) == {0: 15, 1: 5}
        assert found.labels.tolist() != sorted(found.labels.tolist())
        assert set(found.texts) <= set(whole.texts) and len(set(found.texts)) == 20
        assert load(path, split, max_samples=20).fingerprint == found.fingerprint
        assert load(path, split, max_samples=20, seed=1).texts != found.texts
        assert load(path, split, max_samples=1000).fingerprint == whole.fingerprint
    fewer = {name: len(load(path, name, max_samples=20, max_test_samples=6).texts) for name in ("train", "test")}
    assert fewer == {"train": 20, "test": 6}


def test_regression_is_found_and_can_be_forced(tmp_path):
    scores = write_labels(tmp_path / "scores.csv", [n / 4 - 1 for n in range(20)])
    train, test = load(scores), load(scores, "test")
    assert train.is_regression and train.num_labels == 1 and train.labels.dtype == np.float64
    assert (len(train.texts), len(test.texts)) == (14, 6)
    assert -1.0 in [*train.labels, *test.labels], "-1 is a target like any other"
    stars = write_labels(tmp_path / "stars.jsonl", [1, 2, 3.0, 10] * 5)
    assert load(stars).label_names == ["1", "2", "3", "10"], "whole numbers are classes, in numeric order"
    assert load(stars, task="regression").labels.max() == 10.0
    assert load(scores, "all", task="classification").num_labels == 19


def test_targets_within_the_range_are_taken_as_they_are(tmp_path):
    for factor, shift in ((1, 1e4), (1, -1e4), (1e14, 0), (1e-14, 0)):
        numbers = [(n / 4 + 0.1) * factor + shift for n in range(20)]
        assert load(write_labels(tmp_path / "rows.jsonl", numbers), "all", task="regression").labels.tolist() == numbers
    write_labels(tmp_path / "own" / "train.jsonl", [0.5, 1.5, 2.0, 3.0])
    write_labels(tmp_path / "own" / "test.jsonl", [1e9 + 0.5] * 3)
    assert load(tmp_path / "own", "test").labels.tolist() == [1e9 + 0.5] * 3, "test targets may be all equal"


def test_folder_of_splits(tmp_path, capsys):
    data, labels = tmp_path / "data", ["no", "yes"] * 10
    write_labels(data / "train-00000-of-00002.jsonl", labels, "first")
    write_labels(data / "train-00001-of-00002.jsonl", labels, "second")
    write_labels(data / "test.jsonl", labels, "held out")
    write_labels(data / "dev.jsonl", labels, "validation")
    assert [load(tmp_path).texts[row] for row in (0, 20)] == ["first 0", "second 0"]
    assert load(tmp_path, "test").texts[0] == "held out 0"
    assert len(load(tmp_path, "all").texts) == 80
    (data / "test.jsonl").unlink()
    assert load(tmp_path, "test").texts[0] == "validation 0", "what is held out need not be split off"
    assert "validation as test" in capsys.readouterr().out
    write_labels(data / "test.jsonl", [-1] * 20, "hidden")
    assert load(tmp_path, "test").texts[0] == "validation 0", "a test split without labels cannot be scored"


def labelled(*labels: Any) -> Callable[[Path], Path]:
    return lambda folder: write_labels(folder / "rows.jsonl", list(labels))


def unlabelled_test(folder: Path) -> Path:
    (own := in_splits(train=[0, 1])(folder)).joinpath("test.csv").write_text("text\na\n")
    return own


def test_all_says_which_rows_have_no_label_and_its_errors_name_no_part(tmp_path, capsys):
    assert load(unlabelled_test(tmp_path), "all").texts == ["text 0", "text 1"]
    assert "own: the test rows have no labels; left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^The labels of .* are all '1'"):
        load(write_labels(tmp_path / "rows.jsonl", [1, 1]), "all")


def in_splits(**labels: list[Any]) -> Callable[[Path], Path]:
    """A folder with a file of these labels per split."""

    def make(folder: Path) -> Path:
        for split, of_split in labels.items():
            write_labels(folder / "own" / f"{split}.jsonl", of_split)
        return folder / "own"

    return make


def with_link(folder: Path) -> Path:
    own = in_splits(train=[0, 1])(folder)
    (own / "test").symlink_to(in_splits(test=[0, 1])(folder / "elsewhere"))
    return own


FAR = [1e7 + n / 4 for n in range(10)]
# fmt: off
OWN_ERRORS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "missing file": (lambda folder: folder / "none.csv", {}, r"No file, folder or known dataset .*none\.csv'"),
    "empty folder": (lambda folder: folder, {}, r"No data file in the folder"),
    "file of no split": (in_splits(train=[0, 1], more=[0, 1]), {}, r"more\.jsonl belongs to no split"),
    "long name": (lambda _: Path("a" * 5000), {}, r"No file, folder or known dataset"),
    "linked folder": (with_link, {}, r"test is a link to a folder"),
    "missing text column": (labelled(0, 1), {"text_column": "txet"}, r"no column 'txet'; columns: text, label"),
    "missing label column": (labelled(0, 1), {"label_column": "y"}, r"no column 'y'; columns: text, label.*--label"),
    "missing template column": (labelled(0, 1), {"text_template": "{text} {b}"}, r"no column 'b'.*--text_template"),
    "template with a format": (labelled(0, 1), {"text_template": "{text!r}"}, r"must name columns in braces"),
    "malformed template": (labelled(0, 1), {"text_template": "{text"}, r"must name columns"),
    "template of half a character": (labelled(0, 1), {"text_template": "{text}\ud800"}, r"must name columns"),
    "column and template": (labelled(0, 1), {"text_template": "{text}", "text_column": "text"}, r"exclude each other"),
    "single class": (labelled("yes", "yes", "yes"), {}, r"all 'yes', not of 2 to 5,000 classes"),
    "too many classes": (labelled(*[*range(5001)] * 2), {}, r"of 5,001 classes, not of 2 to 5,000 .*regression"),
    "all labels missing": (labelled(None, "", -1), {}, r"3 of 3 train rows .* no label \(missing or -1\): rows 1, 2"),
    "class -1 next to one other": (labelled(-1, 1, 1), {}, r"all '1'.*name a class -1 in words"),
    "class that train lacks": (in_splits(train=["no", "yes"], test=["no", "maybe"]), {},
        r"1 of 2 test rows .* classes that train lacks: maybe"),
    "equal targets": (labelled(1.5, 1.5, 1.5), {}, r"The train targets .* all equal\. .* add rows"),
    "targets far from 0": (labelled(*FAR), {}, r"mean 1000000.*lose their digits.*subtract its mean"),
    "test targets far from 0": (in_splits(train=[0.5, 1.5, 2.0], test=FAR), {}, r"The test targets .* subtract its"),
    "targets near the largest": (labelled(-1.7e308, 1.7e308, 0.5), {}, r"lose their digits\. Rescale the column"),
    "no test labels": (unlabelled_test, {}, r"The test rows have no column 'label'; columns: text\..*--divide_train"),
    "one row": (labelled("yes"), {}, r"a single row"),
    "train absent": (in_splits(test=[0, 1]), {}, r"no split 'train'; splits: test"),
    "misspelt key": (lambda _: Path("emotoin"), {}, r"'emotoin' .*Did you mean emotion\?.*docstrings/<task>"),
    "key without its owner": (lambda _: Path("banking77"), {}, r"Did you mean legacy-datasets/banking77\?"),
}
# fmt: on


@pytest.mark.parametrize("case", OWN_ERRORS)
def test_error_of_own_data(case, tmp_path):
    make, options, message = OWN_ERRORS[case]
    with pytest.raises(UserError, match=message):
        load(make(tmp_path), **options)
