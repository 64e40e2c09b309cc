"""Hostile and broken input: it works, or is refused in a sentence; never a wrong number, never a traceback."""

import csv
import json
import math
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cache
import K_sweep
from fig_plot import collect
from tests.conftest import ROOT, configure, run_in_process, write_rows
from utils.data.load import LabelledTexts, load_splits, load_texts
from utils.data.splits import stratified_rows
from utils.results import load_json, save_json, write_atomically
from utils.script import UserError
from utils.settings import Data, Run

# ------------------------------------------------------------------ datasets
WORDS = st.sampled_from(["a red house", "the river", "stone", "music of a small engine"])
ODD_TEXT = st.one_of(
    *(st.just(""), st.just("  \t\n "), st.just("a"), st.just("x" * 100_000), st.just("\u200b"), st.just("\ufeffa")),
    *(st.just("\x00"), st.just("a\x1b[31m\x07\x7f"), st.just("a\u2028b\u0085c"), st.just("\ud800"), st.just('"')),
    *(st.none(), st.integers(), st.floats(), st.booleans(), st.just([]), st.just({"text": "a"}), st.text(max_size=20)),
)
ODD_LABEL = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.just(10**400), st.just(-1), st.just(1e308)),
    *(
        st.sampled_from(
            ["", " ", "nan", "NA", "none", "a", "A", " a", "1", "1.0", "01", "inf", "-1", "\ud800", "\x00"]
        ),
    ),
    *(st.just([1]), st.just([1, 2]), st.just({"a": 1}), st.text(max_size=5)),
)
LABELS = st.sampled_from(["yes", "no", "perhaps"]) | st.sampled_from([0, 1, 2])


def rows(text: st.SearchStrategy, label: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.fixed_dictionaries({"text": text, "label": label}), max_size=12)


@st.composite
def hostile_rows(draw) -> list[dict]:
    """Some plain rows, some odd ones among them: of the texts, of the labels, or of both."""
    odd = draw(st.sampled_from([rows(ODD_TEXT, LABELS), rows(WORDS, ODD_LABEL), rows(ODD_TEXT, ODD_LABEL)]))
    return draw(st.permutations([*draw(rows(WORDS, LABELS)), *draw(odd)]))


def found_or_refused(path: Path, **options) -> dict[str, LabelledTexts] | None:
    """What is loaded; None where it is refused in one sentence."""
    try:
        return load_splits(Data(str(path), **options), Run(), "all")
    except UserError as error:
        message = str(error)
        assert len(message) > 20 and "\n" not in message.replace("\\n", "") and len(message) < 1500
        return None


def check(found: LabelledTexts, given: list[dict]) -> None:
    """Every loaded text has the label of a row with that text; no row is there twice, and no label is made up."""
    assert len(found.texts) == len(found.labels) and all(found.texts)
    written = Counter(str(row["text"]["text"] if isinstance(row["text"], dict) else row["text"]) for row in given)
    assert not Counter(found.texts) - written
    if found.is_regression:
        numbers = {as_number(row["label"]) for row in given}
        assert np.isfinite(found.labels).all() and set(found.labels.tolist()) <= numbers
        return
    assert found.labels.min() >= 0 and found.labels.max() < found.num_labels == len(set(found.labels.tolist()))
    by_text: dict[str, set[str]] = {}
    for row in given:
        label = row["label"]
        spellings = {str(label).strip()}
        if (number := as_number(label)) is not None and math.isfinite(number) and number.is_integer():
            spellings |= {str(int(number)), str(label)}
        text = row["text"]["text"] if isinstance(row["text"], dict) else row["text"]
        by_text.setdefault(str(text), set()).update(spellings)
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
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=hostile_rows(), task=st.sampled_from(["auto", "classification", "regression"]))
def test_odd_cells_work_or_are_refused(hostile, task, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", hostile)
    found = found_or_refused(path, task=task)
    if found:
        check(found["all"], hostile)


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=rows(st.text(max_size=10), st.sampled_from(["yes", "no", "1", "2.5", ""])))
def test_a_csv_file_gives_what_python_wrote(hostile, tmp_path):
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(hostile)
    found = found_or_refused(tmp_path / "rows.csv")
    if found:
        check(found["all"], hostile)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": [b"\xff", b"a"], "label": [0, 1]}, "not UTF-8"),
        ({"text": ["a", "b"], "label": [0.5, math.inf]}, "no finite number"),
        ({"text": ["a", "b"], "label": [[], [1]]}, "is a list"),
        ({"text": ["a", "b"], "label": [math.nan, math.nan]}, "missing"),
    ],
)
def test_a_parquet_file_that_makes_no_task_is_refused(columns, message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=message):
        load_texts(Data(str(tmp_path / "rows.parquet")), Run(), "all")


def test_a_class_for_every_text_is_refused_within_seconds(tmp_path):
    names = [f"class {number}" for number in range(100_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": names, "label": names}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="70,000 classes; at least two classes are needed"):
        load_texts(Data(str(tmp_path / "rows.parquet")), Run(), "train")


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=12), share=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_a_stratified_sample_is_the_one_that_a_search_row_by_row_takes(counts, share, seed):
    num = max(1, int(share * sum(counts)))
    quota = num * np.array(counts) / sum(counts)
    take = np.maximum(np.floor(quota).astype(int), int(num >= len(counts)))
    while take.sum() != num:
        if take.sum() > num:
            take[np.argmax(take)] -= 1
        else:
            take[np.argmax(quota - take)] += 1
    classes = np.repeat(np.arange(len(counts)), counts)
    chosen = stratified_rows(classes, num, seed)
    assert len(set(chosen)) == num and np.bincount(classes[chosen], minlength=len(counts)).tolist() == take.tolist()


def test_texts_of_one_token_and_of_100_000_characters_give_finite_scores(model_dirs, tmp_path):
    long = "the small stone of a large house " * 3000
    texts = [long, *("red", "a", "\x1b[31m\x07", "\u200b", "green river", "music", "engine", "of", "quickly")] * 4
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": t + str(i), "label": "ab"[i % 2]} for i, t in enumerate(texts)]
    )
    shared = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(path), "results_dir": tmp_path / "results"}
    for split in ("train", "test"):
        cache.main(configure(cache, **shared, split=split))
    result = K_sweep.main(configure(K_sweep, **shared, picture=False))
    assert len(long) + 1 > 98_000 and 0 <= result["score"]["retained"]["value"] <= 1


# ------------------------------------------------------------------ results
@pytest.fixture(scope="module")
def made(model_dirs, rows_path, tmp_path_factory) -> dict:
    """Settings of moments and scores that are there."""
    shared = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}
    shared["results_dir"] = tmp_path_factory.mktemp("made")
    cache.main(configure(cache, **shared))
    K_sweep.main(configure(K_sweep, **shared, picture=False))
    return shared


@pytest.fixture
def copied(made, tmp_path) -> dict:
    return {**made, "results_dir": Path(shutil.copytree(made["results_dir"], tmp_path / "results"))}


def moments_of(shared: dict) -> Path:
    return cache.config_path(configure(cache, **shared))


def rewrite_header(path: Path, change) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])


def sizes(header: dict) -> None:
    header["layer.0.pooled_mean"]["shape"] = [2**40, 2**40]


def lacks(field: str):
    def change(header: dict) -> None:
        metadata = json.loads(header["__metadata__"]["json"])
        del metadata[field]
        header["__metadata__"]["json"] = json.dumps(metadata)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(struct.pack("<Q", 2**63 - 1) + path.read_bytes()[8:]),
        lambda path: path.write_bytes(struct.pack("<Q", 10**9) + b"{}"),
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: rewrite_header(path, sizes),
        lambda path: rewrite_header(path, lambda header: header.pop("layer.0.prefix_next_cross_moment")),
        lambda path: rewrite_header(path, lambda header: header.pop("__metadata__")),
        *(lambda path, field=field: rewrite_header(path, lacks(field)) for field in
          ("config", "rounding", "num_pairs", "label_names", "class_counts", "crc32", "layers")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)  # fmt: skip
def test_damaged_moments_are_refused_in_one_sentence(copied, damage, monkeypatch):
    damage(moments_of(copied))
    options = [word for name, value in copied.items() for word in (f"--{name}", value)]
    code = run_in_process(monkeypatch, "K_sweep.py", *options, "--subspace", "pca", "--no_picture")
    message = str(code)
    assert message.startswith("error: ") and "safetensors" in message and "\n" not in message


@pytest.mark.parametrize("field", ["config", "moments", "held_out", "layers", "score", "fractions", "environment"])
def test_a_score_without_a_field_is_named_and_skipped(copied, field, monkeypatch, capsys):
    path = K_sweep.output_path(configure(K_sweep, **copied))
    result = json.loads(path.read_text())
    save_json(path, {name: value for name, value in result.items() if name != field})
    _, results, skipped = collect.read_all(copied["results_dir"])
    assert (len(results), len(skipped)) in ((0, 1), (1, 0)) and all(str(path) in line for line in skipped)
    try:
        K_sweep.main(configure(K_sweep, **copied, picture=False))
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("text", ["", "null", "[]", '"a"', "{", "[" * 100_000, "\ud800", '{"config": 3}'])
def test_what_is_no_result_is_refused(copied, text, tmp_path):
    path = K_sweep.output_path(configure(K_sweep, **copied))
    path.write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=path.name):
        K_sweep.main(configure(K_sweep, **copied, picture=False))


def test_an_entry_that_is_not_there_names_its_file(tmp_path):
    (tmp_path / "result.json").write_text('{"config": {"model_name": "a"}}')
    found = load_json(tmp_path / "result.json")
    assert found == {"config": {"model_name": "a"}} and found.get("seed") is None and "seed" not in found
    for read in (lambda: found["environment"], lambda: found["config"]["seed"]):
        with pytest.raises(UserError, match=r"result\.json is no whole result"):
            read()


def test_a_folder_at_the_place_of_a_result_is_named_before_the_work(copied, monkeypatch):
    path = K_sweep.output_path(configure(K_sweep, **copied))
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(K_sweep, "sweep_layer", lambda *arguments: pytest.fail("it has begun to work"))
    with pytest.raises(UserError, match="it is a folder"):
        K_sweep.main(configure(K_sweep, **copied, picture=False))


def test_results_behind_a_symbolic_link_are_read_and_written_there(copied, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(copied["results_dir"] / "moments", elsewhere)
    (copied["results_dir"] / "moments").symlink_to(elsewhere)
    K_sweep.main(configure(K_sweep, **copied, picture=False))
    cache.main(configure(cache, **copied, split="test"))
    assert list(elsewhere.rglob("test.safetensors")) and not list(tmp_path.rglob("*.tmp"))


def test_a_link_at_the_place_of_a_folder_is_replaced_and_not_what_it_leads_to(tmp_path):
    somebodys = tmp_path / "somebodys"
    somebodys.mkdir()
    (somebodys / "file").write_text("theirs")
    (tmp_path / "adapter").symlink_to(somebodys)
    with write_atomically(tmp_path / "adapter") as folder:
        folder.mkdir()
        (folder / "file").write_text("ours")
    assert (somebodys / "file").read_text() == "theirs" and (tmp_path / "adapter" / "file").read_text() == "ours"
    assert not (tmp_path / "adapter").is_symlink()


def test_two_runs_of_the_same_result_at_once_both_end_well(made, tmp_path):
    results = Path(shutil.copytree(made["results_dir"], tmp_path / "results"))
    shutil.rmtree(results / "ntps")
    options = [f"--{name}={value}" for name, value in {**made, "results_dir": results}.items()]
    command = [sys.executable, "K_sweep.py", *options, "--no_picture"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    [path] = (results / "ntps").rglob("*.json")
    before = json.loads(K_sweep.output_path(configure(K_sweep, **made)).read_text())
    assert json.loads(path.read_text())["layers"] == before["layers"] and not list(results.rglob("*.tmp"))
