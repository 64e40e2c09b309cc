"""What real files hold: quotation marks, missing labels, cells that are no text, encodings, copies of hub datasets."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_data import load
from utils.script import UserError

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_labels(folder: Path, labels: list[Any], name: str = "rows.jsonl") -> Path:
    """Rows of these labels in the format of the suffix."""
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]
    path = folder / name
    if path.suffix == ".parquet":
        return write_parquet(path, {"text": [row["text"] for row in rows], "label": labels})
    if path.suffix in (".csv", ".tsv"):
        tab = "," if path.suffix == ".csv" else "\t"
        return write(path, f"text{tab}label\n" + "".join(f"{row['text']}{tab}{row['label']}\n" for row in rows))
    return write(path, json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# ------------------------------------------------------------------ JSON lines
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_keys_of_json_lines_may_come_late_or_be_missing(end: str, tmp_path: Path) -> None:
    lines = ['{"text": "one"}', '{"text": "two\u2028three", "label": "a"}', "", '{"label": "b", "text": "four"}']
    found = load(write(tmp_path / "rows.jsonl", end.join(lines)), "all")
    assert found.texts == ["two\u2028three", "four"] and found.labels.tolist() == [0, 1]
    lines[2] = "[1, 2]"
    with pytest.raises(UserError, match="row 3: '\\[1, 2\\]' is not an object"):
        load(write(tmp_path / "list.jsonl", end.join(lines)), "all")


# ------------------------------------------------------------------ tab-separated
def test_quotation_marks_of_glue_are_characters(tmp_path: Path) -> None:
    lines = ["label\ttext", 'a\t"green red', "b\tplain", 'a\tmusic "', 'b\t"all"', 'a\tsay ""hm"" now']
    found = load(write(tmp_path / "glue.tsv", "\n".join(lines) + "\n"), "all")
    assert found.texts == ['"green red', "plain", 'music "', '"all"', 'say ""hm"" now']
    assert found.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.skipif(not CASES.is_dir(), reason="no shared/cases beside the repository")
def test_shared_cases(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("label_first.tsv", "text_first.tsv"):
        assert len(load(CASES / name, "all").texts) == 24
    assert load(CASES / "words.csv", "all").label_names == ["neg", "pos"]
    assert load(CASES / "numbers.csv", "all").label_names == ["0", "1"]
    assert load(CASES / "blank.csv", "all").label_names == ["angry", "calm", "glad"]
    with pytest.raises(UserError, match=r"subsets en, de\. Name one: --dataset_name .*subsets:en"):
        load(CASES / "subsets")
    assert len(load(f"{CASES / 'subsets'}:de", "test").texts) == 20
    found = load(CASES / "regression.csv", "all", label_column="score")
    assert found.is_regression and len(found.texts) == 23
    assert "blanks around them" in (err := capsys.readouterr().err) and "written 'NaN'" in err


# ------------------------------------------------------------------ cells that are text, and that are not
RENDERED = [
    ([{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}], "(0) red (1) blue"),
    ([{"text": "red"}, {"text": "blue"}], "(0) red (1) blue"),
    ({"label": ["A", "B"], "text": ["red", "blue"]}, "(0) red (1) blue"),
    ({"text": "red"}, "red"),
    (["red", 7], "(0) red (1) 7"),
    (1999, "1999"),
]
REFUSED = [
    ({"stem": "Why?", "choices": []}, r"an object with the keys 'stem', 'choices'"),
    ({"text": "Why?", "context": "long"}, r"an object with the keys 'text', 'context'"),
    ([{"role": "user", "content": "hi"}], r"a list with an object with the keys 'role', 'content'"),
    ([["red"], ["blue"]], r"a list with a list"),
    (True, r"bool: True"),
    (float("inf"), r"float: inf"),
]


@pytest.mark.parametrize(("cell", "text"), RENDERED)
def test_cell_that_is_evidently_text(cell: Any, text: str, tmp_path: Path) -> None:
    rows = [{"body": cell, "label": label} for label in "abab"]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    assert load(path, "all", text_column="body").texts == [text] * 4


@pytest.mark.parametrize(("cell", "found"), REFUSED)
def test_cell_that_is_no_text_is_named(cell: Any, found: str, tmp_path: Path) -> None:
    rows = [{"body": "good", "label": "a"}, {"body": cell, "label": "b"}]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    with pytest.raises(UserError, match=f"Column 'body' of .*, train row 2, holds {found}"):
        load(path, text_column="body")


def test_bytes_and_other_types_of_parquet(tmp_path: Path) -> None:
    columns = {"text": [b"caf\xc3\xa9", b"tea"] * 2, "label": ["a", "b"] * 2}
    assert load(write_parquet(tmp_path / "bytes.parquet", columns), "all").texts[0] == "café"
    columns["text"] = [b"caf\xc3\xa9", b"tea", b"\xff", b"tea"]
    with pytest.raises(UserError, match="train row 3, holds bytes that are not UTF-8"):
        load(write_parquet(tmp_path / "bytes.parquet", columns))
    pairs = pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    path = write_parquet(tmp_path / "map.parquet", {"text": ["one", "two"], "extra": pairs, "label": ["a", "b"]})
    assert load(path, "all").texts == ["one", "two"]
    with pytest.raises(UserError, match=r"Column 'extra' .* row 1, holds a list with tuple"):
        load(path, text_column="extra")
    nested = {"text": [{"en": "one"}, {"en": "two"}], "label": ["a", "b"]}
    with pytest.raises(UserError, match="an object with the keys 'en'"):
        load(write_parquet(tmp_path / "nested.parquet", nested))
    days = {"text": ["one", "two"], "day": [datetime.date(2020, 1, 2)] * 2, "label": ["a", "b"]}
    path = write_parquet(tmp_path / "days.parquet", days)
    assert load(path, "all", text_template="{day} {text}").texts[0] == "2020-01-02 one"


def test_texts_written_as_python_bytes_are_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["b'one'", 'b"it\'s"', r"b'caf\xc3\xa9'", "b'four'"]
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, "abab", strict=True)]
    assert load(write(tmp_path / "rows.jsonl", "\n".join(rows)), "all").texts == ["one", "it's", "café", "four"]
    assert "written as Python bytes" in capsys.readouterr().out
    rows[1] = json.dumps({"text": "plain", "label": "b"})
    assert load(write(tmp_path / "rows.jsonl", "\n".join(rows)), "all").texts[0] == "b'one'"


def test_line_break_that_ends_every_text_is_taken_off(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"text {n}\nmore \n", "label": n % 2}) for n in range(4)]
    assert load(write(tmp_path / "rows.jsonl", "\n".join(rows)), "all").texts[0] == "text 0\nmore "


# ------------------------------------------------------------------ labels
@pytest.mark.parametrize("word", ["nan", "NaN", "NAN", "NA", "N/A", "n/a", "null", "NULL", "None", "<NA>", "", " "])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_missing_label_is_no_class(word: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_labels(tmp_path, ["pos", "neg", word, "pos"], f"rows.{suffix}")
    found = load(path, "all")
    assert found.label_names == ["neg", "pos"] and found.texts == ["text 0", "text 1", "text 3"]
    err = capsys.readouterr().err
    assert "1 of 4 train rows" in err and "no label (missing or -1): rows 3" in err and "left out" in err
    assert not word.strip() or f"written {word!r}: a class called so needs another name" in err


@pytest.mark.parametrize("word", ["nan", "NA", "null", "None", ""])
def test_missing_target_is_no_class(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(write_labels(tmp_path, ["0.5", word, "-1", "2.25"], "rows.csv"), "all")
    assert (f"written {word!r}" if word else "rows 2") in capsys.readouterr().err
    assert found.is_regression and found.labels.tolist() == [0.5, -1.0, 2.25]
    found = load(write_labels(tmp_path, ["0.5", word, "-1", "2.25"]), "all")
    assert found.is_regression and found.labels.tolist() == [0.5, -1.0, 2.25]


CODES = [  # labels, class names; a number stands for a regression target
    (["01", "1", "02"], ["01", "02", "1"]),
    (["1.1", "1.10", "1.2"], ["1.1", "1.10", "1.2"]),
    (["1.3", "1.10", "1.2"], ["1.10", "1.2", "1.3"]),
    (["1e3", "1000", "2"], ["1000", "1e3", "2"]),
    (["1e3", "2e3", "7"], ["1e3", "2e3", "7"]),
    (["0x1", "1"], ["0x1", "1"]),
    (["+1", "1"], ["+1", "1"]),
    (["-0", "0"], ["-0", "0"]),
    (["1", "1.0"], ["1", "1.0"]),
    ([".5", "0.5"], [".5", "0.5"]),
    (["1.", "1"], ["1", "1."]),
    (["1_0", "10"], ["10", "1_0"]),
    (["１", "1"], ["1", "１"]),
    (["0.1", "0.10000000000000000001"], ["0.1", "0.10000000000000000001"]),
    (["-1.50", "-1.5", "2.25"], ["-1.5", "-1.50", "2.25"]),
    (["1.0", "2.0"], ["1", "2"]),
    (["3", "-7", "10"], ["-7", "3", "10"]),
    (["0.5", "-1.25", "2"], [0.5, -1.25, 2.0]),
    (["0.50", "0.75", "1.00"], [0.5, 0.75, 1.0]),
    (["1e-05", "0.5", "-2.0"], [1e-5, 0.5, -2.0]),
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize(("words", "expected"), CODES)
def test_words_are_numbers_only_if_written_so(
    words: list[str], expected: list[Any], suffix: str, tmp_path: Path
) -> None:
    found = load(write_labels(tmp_path, words, f"rows.{suffix}"), "all")
    if isinstance(expected[0], float):
        assert found.is_regression and found.labels.tolist() == expected
    else:
        assert found.label_names == expected and sorted(found.labels.tolist()) == list(range(len(words)))


def test_number_and_another_spelling_stay_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(write_labels(tmp_path, [1, "01", 2]), "all").label_names == ["01", "1", "2"]
    assert "'01' and '1'" in (err := capsys.readouterr().err) and "not written as numbers are" in err
    assert load(write_labels(tmp_path, [1.1, "1.10", 2]), "all").label_names == ["1.1", "1.10", "2"]
    found = load(write_labels(tmp_path, ["1.1", "1.10", "2"]), "all", task="regression")
    assert found.labels.tolist() == [1.1, 1.1, 2.0]


def test_word_among_numbers_is_named(tmp_path: Path) -> None:
    path = write_labels(tmp_path, ["0.5", "1.25", "?", "2.5"], "rows.csv")
    with pytest.raises(UserError, match=r"train row 3 is '\?'.*--task classification"):
        load(path)
    assert load(path, "all", task="classification").label_names == ["0.5", "1.25", "2.5", "?"]
    with pytest.raises(UserError, match=r"train row 3, is not a number: '\?'"):
        load(path, task="regression")


@pytest.mark.parametrize("word", ["inf", "-Infinity", "1e999", "9" * 400])
def test_infinite_target_is_named_by_row(word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train row 3, is infinite"):
        load(write_labels(tmp_path, ["0.5", "", word, "2.5"], "rows.csv"), task="regression")


def test_none_in_small_letters_is_a_class_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(write_labels(tmp_path, ["none", "joy"] * 2, "rows.csv"), "all")
    assert found.label_names == ["joy", "none"]
    assert "'none' is a class" in capsys.readouterr().err


def test_blanks_and_case_of_classes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(write_labels(tmp_path, ["calm ", "calm", "\tglad", "glad"], "rows.csv"), "all")
    assert found.label_names == ["calm", "glad"] and found.labels.tolist() == [0, 0, 1, 1]
    assert "2 labels" in (err := capsys.readouterr().err) and "blanks around them" in err
    found = load(write_labels(tmp_path, ["Calm", "calm", "glad"], "rows.csv"), "all")
    assert found.label_names == ["Calm", "calm", "glad"]
    assert "'Calm' and 'calm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "names", "encoded"),
    [
        (["1", 1, "2", 2], ["1", "2"], [0, 0, 1, 1]),
        ([1, "1.0", 2.0, "2"], ["1", "2"], [0, 0, 1, 1]),
        ([1, 1.0, "b", "1"], ["1", "b"], [0, 0, 1, 0]),
        ([["x"], ["y"], ["x"]], ["x", "y"], [0, 1, 0]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([2**63 + 2, 2**63 + 1, 2**63 + 2], ["9223372036854775809", "9223372036854775810"], [1, 0, 1]),
        ([int("1" * 400), int("2" * 400)], ["1" * 400, "2" * 400], [0, 1]),
        (["1" * 5000, "2" * 5000], ["1" * 5000, "2" * 5000], [0, 1]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
    ],
)
def test_labels_of_json(labels: list[Any], names: list[str], encoded: list[int], tmp_path: Path) -> None:
    found = load(write_labels(tmp_path, labels), "all")
    assert found.label_names == names and found.labels.tolist() == encoded


def test_lists_of_one_label_are_said_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(write_labels(tmp_path, [[2], [1], [2]]), "all")
    assert found.label_names == ["1", "2"] and "3 labels of" in (err := capsys.readouterr().err)
    assert "lists of one" in err
    assert load(write_labels(tmp_path, [2.5, [1], 0.5]), "all").labels.tolist() == [2.5, 1.0, 0.5]
    assert "1 labels of" in capsys.readouterr().err


def test_labels_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mix true or false with numbers"):
        load(write_labels(tmp_path, [True, 1, 0]))
    with pytest.raises(UserError, match="mix true or false with numbers"):  # False is no target of 0 beside 2.5
        load(write_labels(tmp_path, [False, 2.5, [1]]), "all", task="regression")
    with pytest.raises(UserError, match=r"Label 2 of .* is an object with the keys name"):
        load(write_labels(tmp_path, ["a", {"name": "b"}]))
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": ' + "1" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is not JSON that can be read .Exceeds the limit"):
        load(path)


def test_long_numbers_of_csv_stay_apart(tmp_path: Path) -> None:
    words = [str(2**63 + 1), str(2**63 + 2), "9" * 400, "8" * 5000]
    assert sorted(load(write_labels(tmp_path, words, "rows.csv"), "all").label_names) == sorted(words)
    assert load(write_labels(tmp_path, ["1.0", *words[:2]], "rows.csv"), "all").num_labels == 3


def test_decimals_dates_and_numpy_types_of_parquet(tmp_path: Path) -> None:
    texts = ["one", "two", "three"]
    whole = {"text": texts, "label": [decimal.Decimal("1.00"), decimal.Decimal("2.00"), None]}
    assert load(write_parquet(tmp_path / "whole.parquet", whole), "all").label_names == ["1", "2"]
    targets = {"text": texts, "label": [decimal.Decimal(word) for word in ("1.25", "2.50", "-1.00")]}
    found = load(write_parquet(tmp_path / "targets.parquet", targets), "all")
    assert found.is_regression and found.labels.tolist() == [1.25, 2.5, -1.0]
    days = {"text": texts, "label": [datetime.date(2020, 1, day) for day in (1, 2, 1)]}
    assert load(write_parquet(tmp_path / "days.parquet", days), "all").label_names == ["2020-01-01", "2020-01-02"]
    small = {"text": texts, "label": np.array([3, 5, 3], np.uint8)}
    assert load(write_parquet(tmp_path / "small.parquet", small), "all").label_names == ["3", "5"]
    half = {"text": texts, "label": np.array([0.5, np.nan, 1.5], np.float32)}
    assert load(write_parquet(tmp_path / "half.parquet", half), "all").labels.tolist() == [0.5, 1.5]


def write_named(path: Path, labels: list[int], names: list[str]) -> Path:
    """A parquet file with class names in the metadata of `datasets`, whether or not the labels are among them."""
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pyarrow.table({"text": [f"text {row}" for row in range(len(labels))], "label": labels})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)
    return path


def test_number_beyond_the_class_names_is_its_own_name(tmp_path: Path) -> None:
    path = write_named(tmp_path / "rows.parquet", [0, 1, 7], ["no", "yes"])
    assert load(path, "all").label_names == ["no", "yes", "7"]


@pytest.mark.parametrize("second", ["train-1", "test"])
def test_class_names_that_differ_between_files_are_refused(second: str, tmp_path: Path) -> None:
    write_named(tmp_path / "train-0.parquet", [0, 1], ["no", "yes"])
    write_named(tmp_path / f"{second}.parquet", [0, 1], ["yes", "no"])
    with pytest.raises(UserError, match=r"class names of column 'label' differ .*: no, yes and yes, no"):
        load(tmp_path)


# ------------------------------------------------------------------ whole files
ROWS = [{"text": f"naïve {row}", "label": word} for row, word in enumerate("abab")]
WHOLE_FILES = {
    "array.jsonl": json.dumps(ROWS, indent=1),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "mark.jsonl": "\ufeff" + "\n".join(map(json.dumps, ROWS)),
    "ends.jsonl": "\r".join(map(json.dumps, ROWS)),
    "ends.csv": "text,label\r" + "".join(f"{row['text']},{row['label']}\r" for row in ROWS),
    "header.csv": "\ufeff\ufefftext , label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS),
    "UPPER.CSV": "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_whole_file_is_read(name: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, WHOLE_FILES[name].encode(encoding))
    for found in (load(path, "all"), load(tmp_path, "all")):
        assert found.texts == [row["text"] for row in ROWS] and found.labels.tolist() == [0, 1, 0, 1]


GOOD = '{"text": "a", "label": 0}\n'
# fmt: off
REFUSED_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("rows.csv", "", r"rows\.csv has no rows: it is empty"),
    "header only": ("rows.tsv", "text\tlabel\n", r"has no rows: only the columns text, label"),
    "blank lines": ("rows.jsonl", "\n\n", r"has no rows"),
    "other kind of file": ("rows.txt", "a", r"rows\.txt.*\.jsonl.*\.parquet"),
    "not JSON": ("rows.jsonl", GOOD * 2 + "{text: b}\n", r"rows\.jsonl, line 3 is not JSON.*'\{text: b\}'"),
    "list cut off": ("rows.json", '[{"text": "a",\n', r"rows\.json is not JSON that can be read \(Expecting property"),
    "a string": ("rows.json", '"text"', r"'text' is not an object"),
    "a number": ("rows.json", "3", r"'3' is not an object"),
    "a list": ("rows.jsonl", GOOD + '["a", 1]\n', r"row 2: .*not an object"),
    "empty texts": ("rows.jsonl", GOOD + '{"text": " ", "label": 1}\n{"label": 1}\n{"text": NaN, "label": 1}\n',
        r"3 train texts .* are empty: rows 2, 3, 4\. Fill or remove"),
    "equal keys": ("rows.jsonl", '{"text": "a", "text": "b", "label": 1}\n' * 2,
        r"line 1 .*keys 'text', 'text', 'label', two of them equal"),
    "split orientation": ("rows.json", '{"columns": ["text"], "data": [["a"]]}', r"keys 'columns', 'data'.*lines=True"),
    "columns": ("rows.json", '{"text": {"0": "a"}, "label": {"0": "b"}}', r"keys 'text', 'label'.*lines=True"),
    "lists": ("rows.jsonl", '{"text": ["a"], "label": ["b"]}', r"keys 'text', 'label'.*lines=True"),
    "by index": ("rows.json", '{"0": {"text": "a"}, "1": {"text": "b"}}', r"keys '0', '1'.*lines=True"),
    "wrapped": ("rows.json", '{"data": [{"text": "a"}]}', r"one object with the keys 'data'.*lines=True"),
    "ragged csv": ("rows.csv", "text,label\na,0\nb,c,1\n", r"line 3: 3 cells under 2 columns.* double quotes"),
    "ragged tsv": ("rows.tsv", 'text\tlabel\n"one\ttwo"\ta\nthree\tb\n',
        r"rows\.tsv, line 2: 3 cells under 2 columns .*no quoting.*\.jsonl"),
    "same column twice": ("rows.csv", "text,text\na,0\n", r"Column names must differ"),
    "open quote": ("rows.csv", 'text,label\n"a,0\n', r"line \d is not csv"),
    "zero bytes": ("rows.csv", "text,label\na\0b,1\n", r"line 2 holds zero bytes"),
    "latin-1": ("rows.jsonl", GOOD.encode() + "é".encode("latin1"), r"not UTF-8: byte 26, line 2\. .*iconv -f latin1"),
    "UTF-16 without mark": ("rows.csv", "text,label\na,1\n".encode("utf-16-le"), r"iconv -f UTF-16LE"),
    "cut UTF-16": ("rows.csv", "text".encode("utf-16")[:-1], r"is not UTF-16: byte"),
    "cut parquet": ("rows.parquet", b"PAR1", r"rows\.parquet cannot be read as parquet"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_whole_file_is_refused(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED_FILES[case]
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / name, content))


def test_parquet_without_rows_or_with_equal_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "none.parquet", {"text": pyarrow.array([], pyarrow.string()), "label": []})
    with pytest.raises(UserError, match="has no rows: only the columns text, label"):
        load(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match='Field "text" exists 2 times'):
        load(tmp_path / "twice.parquet")


def test_empty_test_file_is_named_and_an_empty_part_is_not(tmp_path: Path) -> None:
    write_labels(tmp_path, list("abab"), "train-0.jsonl")
    write(tmp_path / "train-1.jsonl", "")
    assert len(load(tmp_path, "all").texts) == 4
    write(tmp_path / "test.jsonl", "")
    with pytest.raises(UserError, match=r"test\.jsonl has no rows: it is empty"):
        load(tmp_path)


def test_folder_of_mixed_formats(tmp_path: Path) -> None:
    write_labels(tmp_path, [1, 2, 1], "train.jsonl")
    write(tmp_path / "test.csv", "text,label\nx,1\ny,2\n")
    assert load(tmp_path).labels.tolist() == [0, 1, 0] and load(tmp_path, "test").labels.tolist() == [0, 1]
    write(tmp_path / "test.jsonl", '{"text": "x", "label": 1}')
    with pytest.raises(UserError, match=r"test\.csv and .*test\.jsonl may be the same rows in two formats"):
        load(tmp_path)


# ------------------------------------------------------------------ folders of the library datasets
SUBSETS = """---
license: mit
configs:
- config_name: en
{default}  data_files:
  - split: train
    path: data/en/part-*.jsonl
  - split: test
    path: data/en/held.jsonl
- config_name: de
  data_dir: data/de
---
"""


def write_subsets(folder: Path, default: str = "") -> Path:
    write(folder / "README.md", SUBSETS.format(default=default))
    for number in (0, 1):
        write_labels(folder / "data" / "en", ["a", "b"], f"part-{number}.jsonl")
    held = [{"text": "007", "label": "a"}, {"text": "NA", "label": "b"}]
    write(folder / "data" / "en" / "held.jsonl", "\n".join(map(json.dumps, held)))
    write_labels(folder / "data" / "de", ["01", "1", "2"], "train.jsonl")
    return folder


def test_subsets_are_read_one_at_a_time(tmp_path: Path) -> None:
    folder = write_subsets(tmp_path / "own")
    assert len(load(f"{folder}:en").texts) == 4 and load(f"{folder}:en", "test").texts == ["007", "NA"]
    assert load(f"{folder}:de", "all").label_names == ["01", "1", "2"]
    with pytest.raises(UserError, match=r"subsets en, de, not 'fr'\. Name one: --dataset_name .*own:en"):
        load(f"{folder}:fr")
    assert len(load(write_subsets(tmp_path / "own", "  default: true\n")).texts) == 4
    write(folder / "README.md", "---\nlicense: mit\n---\nconfigs: are not named here\n")
    with pytest.raises(UserError, match=r"own has no subsets.*Leave out :en"):
        load(f"{folder}:en")
    write(folder / "README.md", SUBSETS.format(default="").replace("part-", "none-"))
    with pytest.raises(UserError, match=r"Dataset .*own cannot be read\. Could"):
        load(f"{folder}:en")


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    found = load(tmp_path / "one", "all")
    assert found.texts == list("abcd") and found.label_names == ["z", "a"] and found.labels.tolist() == [0, 1, 1, 0]
    datasets.DatasetDict(train=rows, test=rows.select([2, 3])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "two").texts == list("abcd") and load(tmp_path / "two", "test").labels.tolist() == [1, 0]
    for split in ("train", "validation"):
        rows.save_to_disk(tmp_path / "each" / split)
    assert load(tmp_path / "each", "test").texts == list("abcd")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"Dataset .*one cannot be"):
        load(tmp_path / "one")
