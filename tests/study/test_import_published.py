"""The import of the authors' pickles: made-up ones are read to the last digit, hostile and damaged ones never run."""

import csv
import os
import pickle

import numpy as np
import pytest

from fig_plot.import_published import NUM_DATASETS, NUM_MODELS, WORDS
from tests.conftest import PUBLISHED, needs_published, run_command, run_in_process

pytestmark = pytest.mark.slow

SCRIPT = "fig_plot/import_published.py"


def made_up_cells(*fields: str, number=np.float64) -> dict:
    """{model: {dataset: {field: number}}} of noise."""
    random = np.random.default_rng(len(fields))
    return {
        f"org/model-{m}": {
            f"dataset {d}": {field: number(random.normal()) for field in fields} for d in range(NUM_DATASETS)
        }
        for m in range(NUM_MODELS)
    }


def made_up_files() -> dict:
    """Contents as the authors' files have them: numpy scalars of both precisions, Python floats, small arrays."""
    point = np.array([[0.1, -2.5]], np.float32)
    return {
        "Fig1.pkl": {subspace: {name: [point] * len(WORDS[name]) for name in WORDS} for subspace in "UV"},
        "Fig2_1.pkl": made_up_cells("align_score", "metric_data", number=float),
        "Fig2_2.pkl": made_up_cells("align_score", "metric_data", number=np.float32),
        "Fig3.pkl": made_up_cells("align_score", "lora_acc", "linear_acc"),
    }


def write_files(folder, contents: dict):
    """Pickles in a subfolder, as in a clone."""
    (folder / "clone" / "fig_plot").mkdir(parents=True)
    for name, content in contents.items():
        raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol=4)
        (folder / "clone" / "fig_plot" / name).write_bytes(raw)
    return folder / "clone"


def read_rows(path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


class Call:
    """Pickles as a call of a function: what a hostile file holds."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ------------------------------------------------------------------ what is read
def test_made_up_files_are_read_to_the_last_digit(tmp_path):
    contents = made_up_files()
    output = tmp_path / "out"
    done = run_command("-m", "fig_plot.import_published", write_files(tmp_path, contents), "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output)
    header, *rows = read_rows(output / "fig1.csv")
    assert header == ["subspace", "category", "word", "component_1", "component_2"]
    assert rows[0] == ["U", "Joy", "lovely", repr(float(np.float32(0.1))), "-2.5"]
    assert len(rows) == 26
    header, *rows = read_rows(output / "fig2.csv")
    assert header == ["model", "dataset", "metric", "ntps", "value"]
    assert len(rows) == 192
    for model, dataset, metric, ntps, value in rows:
        file = {"train_accuracy": "Fig2_1.pkl", "train_mse": "Fig2_2.pkl"}[metric]
        cell = contents[file][model][dataset]
        assert (float(ntps), float(value)) == (cell["align_score"], cell["metric_data"])
    header, *rows = read_rows(output / "fig3.csv")
    assert header == ["model", "dataset", "ntps", "linear_accuracy", "lora_accuracy"]
    for model, dataset, *values in rows:
        cell = contents["Fig3.pkl"][model][dataset]
        assert [*map(float, values)] == [cell["align_score"], cell["linear_acc"], cell["lora_acc"]]


def test_files_of_numpy_1_are_read(tmp_path, monkeypatch):
    contents = made_up_files()
    # the name only differs in its length, which the pickle of protocol 4 states in the byte before it
    raw = pickle.dumps(contents["Fig3.pkl"], protocol=4)
    old = raw.replace(b"\x15numpy._core.multiarray", b"\x14numpy.core.multiarray")
    frame = old.index(b"\x95") + 1
    length = int.from_bytes(raw[frame : frame + 8], "little") - 1
    contents["Fig3.pkl"] = old[:frame] + length.to_bytes(8, "little") + old[frame + 8 :]
    folder = write_files(tmp_path, contents)
    assert run_in_process(monkeypatch, SCRIPT, folder, "--output_dir", tmp_path / "out") == 0


@needs_published
@pytest.mark.parametrize("name", ["fig1.csv", "fig2.csv", "fig3.csv"])
def test_published_files_equal_their_csv(name, tmp_path, monkeypatch):
    if not (PUBLISHED / name).is_file():
        pytest.skip(f"no {name} beside the authors' files")
    assert run_in_process(monkeypatch, SCRIPT, PUBLISHED, "--output_dir", tmp_path) == 0
    found, expected = read_rows(tmp_path / name), read_rows(PUBLISHED / name)
    assert found[0] == expected[0]
    num_names = sum(column in ("subspace", "category", "word", "model", "dataset", "metric") for column in found[0])
    ours, theirs = (
        {tuple(row[:num_names]): [*map(float, row[num_names:])] for row in rows[1:]} for rows in (found, expected)
    )
    assert len(found) == len(expected) == len(ours) + 1
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        assert values == pytest.approx(theirs[key], rel=0, abs=1e-12)


# ------------------------------------------------------------------ what is refused
def hostile(kind: str, marker) -> object:
    """A content that leaves the marker file behind where it is run."""
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, touch),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "open": Call(open, str(marker), "w"),
        "inside an array": np.array([[Call(eval, touch), 0]], object),
        "old protocol": f"cbuiltins\neval\n(V{touch}\ntR.".encode(),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    }[kind]


@pytest.mark.parametrize(
    "kind, named",
    [
        ("os.system", "posix.system"),
        ("eval", "builtins.eval"),
        ("getattr", "builtins.getattr"),
        ("open", "open"),
        ("inside an array", "'O8'"),
        ("old protocol", "builtins.eval"),
        ("dotted name", "numpy.dtype.__init__"),
    ],
)
def test_hostile_file_is_refused_and_nothing_runs(kind, named, tmp_path, monkeypatch):
    marker, output = tmp_path / "marker", tmp_path / "out"
    content = hostile(kind, marker)
    folder = write_files(tmp_path, made_up_files() | {"Fig3.pkl": content})  # the last one read
    message = run_in_process(monkeypatch, SCRIPT, folder, "--output_dir", output)
    assert str(folder / "fig_plot" / "Fig3.pkl") in message
    assert named in message
    assert not marker.exists()
    assert not output.exists()


def test_the_hostile_files_would_run_in_a_plain_unpickler(tmp_path):
    """Else the test above proves nothing."""
    for kind in ("os.system", "eval", "open", "inside an array", "old protocol"):
        content = hostile(kind, tmp_path / kind)
        raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol=4)
        (tmp_path / kind).unlink(missing_ok=True)
        pickle.loads(raw)  # noqa: S301, made just above
        assert (tmp_path / kind).exists(), kind


def test_refusal_ends_in_one_sentence_and_exit_code_1(tmp_path):
    folder = write_files(tmp_path, made_up_files() | {"Fig1.pkl": Call(os.system, f"touch {tmp_path / 'marker'}")})
    done = run_command("-m", "fig_plot.import_published", folder, "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "marker").exists()


def truncated(content) -> bytes:
    return pickle.dumps(content, protocol=4)[:-40]


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("Fig3.pkl", truncated, "truncated"),
        ("Fig3.pkl", lambda content: b"", "EOFError"),
        ("Fig3.pkl", lambda content: b"\x80\x04K\x01R.", "refused"),
        ("Fig3.pkl", lambda content: [content], "8 models"),
        ("Fig3.pkl", lambda content: dict(list(content.items())[1:]), "8 models"),
        ("Fig3.pkl", lambda content: content | {"org/model-0": content["org/model-0"] | {"x": {}}}, "12 datasets"),
        ("Fig2_1.pkl", lambda content: made_up_cells("align_score", "lora_acc"), "metric_data"),
        ("Fig2_1.pkl", lambda content: made_up_cells("align_score", "metric_data", number=str), "finite numbers"),
        ("Fig2_2.pkl", lambda content: made_up_cells("align_score", "metric_data", number=np.int64), "'i8'"),
        ("Fig2_2.pkl", lambda content: made_up_cells("align_score", "metric_data", number=lambda x: np.nan), "finite"),
        ("Fig1.pkl", lambda content: {"U": content["U"]}, "U and V"),
        ("Fig1.pkl", lambda content: {s: c | {"Be": c["Be"][1:]} for s, c in content.items()}, "5 words of Be"),
        ("Fig1.pkl", lambda content: {s: c | {"Be": [np.ones(2)] * 5} for s, c in content.items()}, "(1, 2)"),
        ("Fig1.pkl", lambda content: {s: c | {"Be": [np.ones((1, 2), ">f4")] * 5} for s, c in content.items()}, "'>'"),
    ],
)
def test_damaged_or_foreign_content_is_named(name, change, named, tmp_path, monkeypatch):
    contents = made_up_files()
    contents[name] = change(contents[name])
    folder = write_files(tmp_path, contents)
    message = run_in_process(monkeypatch, SCRIPT, folder, "--output_dir", tmp_path / "out")
    assert str(folder / "fig_plot" / name) in message
    assert named in message
    assert not (tmp_path / "out").exists()


def test_missing_ambiguous_and_wrong_paths_are_named(tmp_path, monkeypatch):
    folder = write_files(tmp_path, made_up_files())
    found = folder / "fig_plot" / "Fig2_2.pkl"
    second = folder / "Fig2_2.pkl"
    second.write_bytes(found.read_bytes())
    message = run_in_process(monkeypatch, SCRIPT, folder, "--output_dir", tmp_path / "out")
    assert f"{second}, {found}" in message
    second.unlink()
    found.unlink()
    message = run_in_process(monkeypatch, SCRIPT, folder, "--output_dir", tmp_path / "out")
    assert f"Sought one Fig2_2.pkl below {folder}, found none" in message
    assert "is not a folder" in run_in_process(monkeypatch, SCRIPT, tmp_path / "nowhere")
