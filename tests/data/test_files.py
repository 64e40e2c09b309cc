"""Real files: formats, encodings, cells that are no text, labels as people write them, folders of other libraries."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest

from tests.data.inputs import load, write, write_labels, write_parquet
from utils.script import UserError

# ------------------------------------------------------------------ whole files
ODD_TEXTS = ["NA", "007", "1e5", "true", 'a "b", c', "line\nbreak", "u\u2028v", "2020-01-01", "nan", " é "]
ODD_ROWS = [{"text": text, "label": "ab"[row % 2]} for row, text in enumerate(ODD_TEXTS)]
ODD_LINES = [json.dumps(row, ensure_ascii=False) for row in ODD_ROWS]
ODD_CSV = ["text , label", *('"{}",{}'.format(row["text"].replace('"', '""'), row["label"]) for row in ODD_ROWS)]
WHOLE_FILES = {
    "array.jsonl": json.dumps(ODD_ROWS, indent=1),
    "lines.json": "\n".join(ODD_LINES),
    "blank.jsonl": "\n\n".join(ODD_LINES),
    "ends.jsonl": "\r".join(ODD_LINES),
    "rows.csv": "\n".join(ODD_CSV),
    "ENDS.CSV": "\r".join(ODD_CSV),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", WHOLE_FILES)
def test_texts_are_read_letter_by_letter(name, encoding, tmp_path):
    path = write(tmp_path / "a b{c}" / name, WHOLE_FILES[name].encode(encoding))
    for found in (load(path, "all"), load(path.parent, "all")):
        assert found.texts == ODD_TEXTS and found.label_names == ["a", "b"] and found.labels.tolist() == [0, 1] * 5


def test_quotation_marks_of_glue_are_characters(tmp_path):
    lines = ["label\ttext", 'a\t"green red', "b\tplain", 'a\tmusic "', 'b\t"all"', 'a\tsay ""hm"" now']
    found = load(write(tmp_path / "glue.tsv", "\n".join(lines) + "\n"), "all")
    assert found.texts == ['"green red', "plain", 'music "', '"all"', 'say ""hm"" now']


def test_keys_of_json_lines_may_come_late_or_be_missing(tmp_path):
    lines = ['{"text": "one"}', '{"text": "two", "label": "a"}', '{"label": "b", "text": "four"}']
    assert load(write(tmp_path / "rows.jsonl", "\n".join(lines)), "all").texts == ["two", "four"]


GOOD = '{"text": "a", "label": 0}\n'
# fmt: off
REFUSED_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("rows.csv", "", r"rows\.csv has no rows: it is empty"),
    "header only": ("rows.tsv", "text\tlabel\n", r"has no rows: only the columns text, label"),
    "other kind of file": ("rows.txt", "a", r"rows\.txt.*\.jsonl.*\.parquet"),
    "not JSON": ("rows.jsonl", GOOD * 2 + "{text: b}\n", r"rows\.jsonl cannot be read: line 3, '\{text: b\}'.*lines="),
    "long number": ("rows.jsonl", GOOD + f'{{"label": {"1" * 5000}}}', r"line 2, .*Exceeds the limit"),
    "deep nesting": ("rows.json", "[" * 100_000, r"rows\.json cannot be read: .*recursion"),
    "a list": ("rows.jsonl", GOOD + '["a", 1]\n', r"row 2, 'a', is not an object"),
    "empty texts": ("rows.jsonl", GOOD + '{"text": " ", "label": 1}\n{"label": 0}\n{"text": NaN, "label": 1}\n' * 2,
        r"\d of \d train rows .* have no text\. Fill or remove"),
    "equal keys": ("rows.jsonl", '{"text": "a", "text": "b", "label": 1}\n' * 2,
        r"line 1, .*keys 'text', 'text', 'label', two of them equal"),
    "columns": ("rows.json", '{"text": {"0": "a"}, "label": {"0": "b"}}', r"Label 1 of .* is a dict"),
    "wrapped": ("rows.json", '{"data": [{"text": "a"}]}', r"no column 'label'; columns: data"),
    "half a character": ("rows.jsonl", GOOD + '{"text": "\\ud800", "label": 1}', r"row 2, holds text that is not"),
    "label of half one": ("rows.jsonl", GOOD + '{"text": "b", "label": "\\ud800"}', r"Label 2 .* is text that is not"),
    "ragged csv": ("rows.csv", "text,label\na,0\nb,c,1\n", r"line 3 has 3 cells under 2 columns.* double quotes"),
    "ragged tsv": ("rows.tsv", 'text\tlabel\n"one\ttwo"\ta\nthree\tb\n', r"line 2 has 3 cells .*no quoting.*\.jsonl"),
    "same column twice": ("rows.csv", "text,text\na,0\n", r"two columns have one name"),
    "semicolons": ("rows.csv", "text;label\na, b;0\n", r"header 'text;label' is one cell\. Separate cells by ','"),
    "open quote": ("rows.csv", 'text,label\n"a,0\n', r"line \d: unexpected end"),
    "latin-1": ("rows.jsonl", GOOD.encode() + "é".encode("latin1"),
        r"'utf-8' .* position 26; if it is text, convert: iconv -f latin1 -t utf-8 .* > new\.jsonl"),
    "cut UTF-16": ("rows.csv", "text".encode("utf-16")[:-1], r"'utf-16.* truncated data"),
    "zero bytes": ("rows.csv", b"text,label\na\0b,yes\n", "holds zero bytes"),
    "cut parquet": ("rows.parquet", b"PAR1", r"rows\.parquet cannot be read: .*Write it again"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_whole_file_is_refused(case, tmp_path):
    name, content, message = REFUSED_FILES[case]
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / name, content))


# ------------------------------------------------------------------ cells that are text, and that are not
RENDERED = [
    ({"label": ["A", "B"], "text": ["red", "blue"]}, "(0) red (1) blue"),
    (["red", 7], "(0) red (1) 7"),
    (1999, "1999"),
]
NO_TEXT = [
    ({"text": "Why?", "context": "long"}, r"a dict: {'text': 'Why\?', 'context'"),
    ([["red"], ["blue"]], r"a list: \['red'\]"),
    (True, r"a bool: True"),
]


def test_cells_that_are_evidently_text_and_that_are_not(tmp_path):
    path = tmp_path / "rows.json"
    for cell, text in RENDERED:
        write(path, json.dumps([{"body": cell, "label": label} for label in "abab"]))
        assert load(path, "all", text_column="body").texts == [text] * 4
    for cell, found in NO_TEXT:
        write(path, json.dumps([{"body": "good", "label": "a"}, {"body": cell, "label": "b"}]))
        with pytest.raises(UserError, match=f"Column 'body' of .*, train row 2, holds {found}"):
            load(path, text_column="body")


def test_types_of_parquet(tmp_path):
    pairs = pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    late = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    columns = {"text": [b"caf\xc3\xa9", b"tea"], "bad": [b"\xff", b""], "map": pairs, "late": late}
    columns |= {"day": [datetime.date(2020, 1, 2)] * 2, "label": ["a", "b"]}
    path = write_parquet(tmp_path / "rows.parquet", columns)
    assert load(path, "all", text_template="{day} {text}").texts[0] == "2020-01-02 café"
    for column, message in {"bad": "row 1, holds text that is not UTF", "map": "holds a tuple", "late": "read"}.items():
        with pytest.raises(UserError, match=f"Column '{column}' .*{message}"):
            load(path, text_column=column)


def test_wrappings_of_every_text_are_taken_off(tmp_path):
    texts = ["b'one'", 'b"it\'s"', r"b'caf\xc3\xa9'", "b'four'"]
    path = write(tmp_path / "rows.json", json.dumps([{"text": text, "label": text[-2]} for text in texts]))
    assert load(path, "all").texts == ["one", "it's", "café", "four"]
    texts[1] = "plain"
    path = write(tmp_path / "rows.json", json.dumps([{"text": text, "label": text[-2]} for text in texts]))
    assert load(path, "all").texts == texts
    rows = [{"text": f"text {n}\nmore \n", "label": n % 2} for n in range(4)]
    assert load(write(tmp_path / "rows.json", json.dumps(rows)), "all").texts[0] == "text 0\nmore "


# ------------------------------------------------------------------ labels
@pytest.mark.parametrize("word", ["nan", "NAN", "NA", "N/A", "n/a", "null", "NULL", "None", "<NA>", "", " "])
def test_missing_label_is_no_class(word, tmp_path, capsys):
    for suffix in ("csv", "jsonl", "parquet"):
        found = load(write_labels(tmp_path / f"rows.{suffix}", ["pos", "neg", word, "pos"]), "all")
        assert found.label_names == ["neg", "pos"] and found.texts == ["text 0", "text 1", "text 3"]
        err = capsys.readouterr().err
        assert "1 of 4 train rows" in err and "no label (missing or -1): rows 3" in err and "left out" in err
        assert f"written {word!r}" in err
        found = load(write_labels(tmp_path / f"targets.{suffix}", ["0.5", word, "-1", "2.25"]), "all")
        assert found.is_regression and found.labels.tolist() == [0.5, -1.0, 2.25]


BIG = 2**63
LABELS: list[tuple[list[Any], list[Any] | str]] = [  # names of classes, targets, or the fault
    *((written, sorted(written)) for written in (
        ["01", "1", "02"], ["1.1", "1.10", "1.2"], ["1e3", "2e3", "7"], ["+1", "1"], ["1", "1.0"],
        ["0.1", "0.10000000000000000001"], ["-1.50", "-1.5", "2.25"], ["1" * 5000, "2" * 5000])),
    (["1.0", "2.0"], ["1", "2"]),
    (["10", "9", "-7"], ["-7", "9", "10"]),
    (["1.0", str(BIG + 1), str(BIG + 2)], ["1.0", str(BIG + 1), str(BIG + 2)]),
    *((written, [*map(float, written)]) for written in (
        ["0.5", "-1.25", "2"], ["0.50", "0.75", "1.00"], ["1e-05", "0.5", "-2.0"])),
    (["0.5", "1.25", "?", "2.5"], r"numbers with decimals, but some are words: '\?'.*--task classification"),
    (["1", 1, "2", 2], ["1", "2"]),
    ([1, 1.0, "b", "1"], ["1", "b"]),
    ([1.1, "1.10", 2], ["1.1", "1.10", "2"]),
    ([True, False, True], ["False", "True"]),
    ([BIG + 2, BIG + 1, BIG + 2], [str(BIG + 1), str(BIG + 2)]),
    ([int("1" * 400), int("2" * 400)], ["1" * 400, "2" * 400]),
    ([-1, 0, 1, 0, 1], ["0", "1"]),
    ([True, 1, 0], "mix true or false with numbers"),
    (["a", {"name": "b"}], r"Label 2 of .* is a dict: {'name': 'b'}"),
    ([[2], [1]], r"Label 1 of .* is a list: \[2\]"),
    ([0.5, float("inf")], r"Target 2 of .* no finite number: 'inf'"),
]  # fmt: skip


@pytest.mark.parametrize(("labels", "expected"), LABELS)
def test_labels(labels, expected, tmp_path):
    typeless = all(isinstance(label, str) for label in labels)
    for suffix in ("jsonl", "csv", "parquet")[: 3 if typeless else 1]:
        path = write_labels(tmp_path / f"rows.{suffix}", labels)
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                load(path)
            continue
        found = load(path, "all")
        if isinstance(expected[0], float):
            assert found.is_regression and found.labels.tolist() == expected
        else:
            row_of = {text: int(text.split()[1]) for text in found.texts}
            assert found.label_names == expected
            for text, label in zip(found.texts, found.labels, strict=True):
                written = labels[row_of[text]]
                assert expected[label] in (str(written), str(written).removesuffix(".0"))


@pytest.mark.parametrize("word", ["a", "?", "-Infinity", "1e999", "1_0", False])
def test_target_that_is_no_number_is_refused(word, tmp_path):
    path = write_labels(tmp_path / "rows.jsonl", ["0.5", "", word, "2.5"])
    with pytest.raises(UserError, match=f"Target 3 of .* no finite number: '{word}'".replace("?", r"\?")):
        load(path, task="regression")


def test_near_classes_are_said(tmp_path, capsys):
    found = load(write_labels(tmp_path / "rows.csv", ["calm ", "calm", "\tglad", "glad"]), "all")
    assert found.label_names == ["calm", "glad"] and found.labels.tolist() == [0, 0, 1, 1]
    assert load(write_labels(tmp_path / "rows.csv", ["Calm", "calm", "none", "01", "1"]), "all").num_labels == 5
    err = capsys.readouterr().err
    assert "'Calm' and 'calm'" in err and "'01' and '1'" in err
    load(write_labels(tmp_path / "rows.csv", ["0.50", "0.755"]), "all")
    assert "oddly written numbers as labels: they name classes" in capsys.readouterr().err


def test_label_types_of_parquet(tmp_path):
    def of(labels: Any, **options: Any) -> Any:
        path = write_parquet(tmp_path / "rows.parquet", {"text": ["one", "two", "three"], "label": labels})
        found = load(path, "all", **options)
        return found.label_names or found.labels.tolist()

    assert of([decimal.Decimal("1.00"), decimal.Decimal("2.00"), None]) == ["1", "2"]
    assert of([decimal.Decimal(word) for word in ("1.25", "2.50", "-1.00")]) == [1.25, 2.5, -1.0]
    assert of([datetime.date(2020, 1, day) for day in (1, 2, 1)]) == ["2020-01-01", "2020-01-02"]
    assert of(np.array([3, 5, 3], np.uint8)) == ["3", "5"]
    assert of(np.array([0.5, np.nan, 1.5], np.float32)) == [0.5, 1.5]
    assert of([b"x", b"y", b"x"]) == ["x", "y"]


def write_named(path: Path, labels: list[int], names: list[str]) -> Path:
    """A parquet file with class names in the metadata of `datasets`, whether or not the labels are among them."""
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pyarrow.table({"text": [f"text {row}" for row in range(len(labels))], "label": labels})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)
    return path


def test_class_names_of_parquet(tmp_path):
    found = load(write_named(tmp_path / "train-0.parquet", [0, 1, 7], ["no", "a"]), "all")
    assert found.label_names == ["no", "a", "7"] and found.labels.tolist() == [0, 1, 2]
    for second in ("train-1", "test"):
        path = write_named(tmp_path / f"{second}.parquet", [0, 1], ["a", "no"])
        with pytest.raises(UserError, match=r"class names of column 'label' differ .*no, a"):
            load(tmp_path)
        path.unlink()


# ------------------------------------------------------------------ folders
def test_folder_of_mixed_formats_and_empty_files(tmp_path):
    write_labels(tmp_path / "train-0.jsonl", [1, 2, 1])
    write(tmp_path / "train-1.jsonl", "")
    write_labels(tmp_path / "test.csv", [1, 2])
    assert load(tmp_path).labels.tolist() == [0, 1, 0] and load(tmp_path, "test").labels.tolist() == [0, 1]
    write_labels(tmp_path / "test.jsonl", [1])
    with pytest.raises(UserError, match=r"test\.csv and .*test\.jsonl may be the same rows in two formats"):
        load(tmp_path)
    (tmp_path / "test.csv").unlink()
    write(tmp_path / "test.jsonl", "")
    with pytest.raises(UserError, match=r"test\.jsonl has no rows: it is empty"):
        load(tmp_path)


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


def test_subsets_are_read_one_at_a_time(tmp_path):
    folder = tmp_path / "own"
    write(folder / "README.md", SUBSETS.format(default=""))
    for name in ("part-0", "part-1", "held"):
        write_labels(folder / "data" / "en" / f"{name}.jsonl", ["a", "b"], name)
    write_labels(folder / "data" / "de" / "train.jsonl", ["01", "1", "2"])
    assert len(load(f"{folder}:en").texts) == 4 and load(f"{folder}:en", "test").texts == ["held 0", "held 1"]
    assert load(f"{folder}:de", "all").label_names == ["01", "1", "2"]
    with pytest.raises(UserError, match=r"subsets en, de, not 'fr'\. Name one: --dataset_name .*own:en"):
        load(f"{folder}:fr")
    write(folder / "README.md", SUBSETS.format(default="  default: true\n"))
    assert len(load(folder).texts) == 4
    write(folder / "README.md", "---\nlicense: mit\n---\nconfigs: none\n")
    with pytest.raises(UserError, match=r"own has no subsets.*Leave out :en"):
        load(f"{folder}:en")
    write(folder / "README.md", SUBSETS.format(default="").replace("part-", "none-"))
    with pytest.raises(UserError, match=r"Dataset .*own cannot be read\. Could"):
        load(f"{folder}:en")


def test_class_names_of_the_hub_and_the_command_that_converts_a_folder_of_save_to_disk(tmp_path, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows})
    assert load("user/named", "all").label_names == ["z", "a"]
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved was written by save_to_disk\..*'train\.parquet'\)$") as raised:
        load(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    exec(str(raised.value).rpartition(": ")[2], {"datasets": datasets})
    found = load(tmp_path / "train.parquet", "all")
    assert found.texts == list("abcd") and found.label_names == ["z", "a"] and found.labels.tolist() == [0, 1, 1, 0]
