"""The import of the authors' pickles: made-up ones are read to the last digit, hostile and damaged ones never run."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest

from fig_plot.import_published import WORDS, Config, main
from tests.conftest import run_command
from utils.script import UserError


def made_up_cells(*fields: str, number=np.float64) -> dict:
    """{model: {dataset: {field: number}}} of noise."""
    random = np.random.default_rng(len(fields))
    datasets = [f"dataset {i}" for i in range(12)]
    return {
        f"org/model-{i}": {name: {field: number(random.normal()) for field in fields} for name in datasets}
        for i in range(8)
    }


def made_up_files() -> dict:
    """Contents as the authors' files have them: numpy scalars of both precisions, Python floats, small arrays."""
    point = np.array([[0.1, -2.5]], np.float32)
    return {
        "Fig1.pkl": {subspace: {name: [point] * len(WORDS[name]) for name in WORDS} for subspace in "UV"},
        "Fig2_1.pkl": made_up_cells("align_score", "metric_data", number=float),
        "Fig2_2.pkl": made_up_cells("align_score", "metric_data", number=np.float32),
        "Fig3.pkl": made_up_cells("align_score", "linear_acc", "lora_acc"),
    }


def write_files(folder, **changed):
    """Pickles in a subfolder, as in a clone; a content of bytes is written as it is."""
    place = folder / "clone" / "fig_plot"
    place.mkdir(parents=True)
    for name, content in (made_up_files() | {f"{name}.pkl": content for name, content in changed.items()}).items():
        (place / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=4))
    return place


class Call:
    """Pickles as a call of a function: the content of a hostile file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_made_up_files_are_read_to_the_last_digit(tmp_path):
    contents, output = made_up_files(), tmp_path / "out"
    of_numpy_2 = pickle.dumps(contents["Fig3.pkl"], protocol=3)  # a pickle that states no lengths
    folder = write_files(tmp_path, Fig3=of_numpy_2.replace(b"numpy._core", b"numpy.core"))
    done = run_command("-m", "fig_plot.import_published", folder, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output)
    words = pd.read_csv(output / "fig1.csv")
    assert words.iloc[0].tolist() == ["U", "Joy", "lovely", float(np.float32(0.1)), -2.5] and len(words) == 26
    scores = pd.read_csv(output / "fig2.csv", float_precision="round_trip").groupby("metric")
    gains = pd.read_csv(output / "fig3.csv", float_precision="round_trip")
    accuracy, mse = (scores.get_group(name).drop(columns="metric") for name in ("train_accuracy", "train_mse"))
    for file, rows in (("Fig2_1.pkl", accuracy), ("Fig2_2.pkl", mse), ("Fig3.pkl", gains)):
        assert len(rows) == 96
        for model, dataset, *values in rows.itertuples(index=False):
            assert values == [*contents[file][model][dataset].values()]


def evaluate(marker) -> Call:
    return Call(eval, f"open({str(marker)!r}, 'w')")


HOSTILE = [  # content of Fig3.pkl, the last one read, and a word that the refusal has
    (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
    (lambda marker: np.array([[evaluate(marker), 0]], object), "'O8'"),
    (lambda marker: pickle.dumps(evaluate(marker), protocol=0), "builtin"),
    (lambda marker: b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "numpy.dtype.__init__"),
]
DAMAGED = [
    ("Fig3", lambda content: pickle.dumps(content, protocol=4)[:-40], "truncated"),
    ("Fig3", lambda content: [content], "AttributeError"),
    ("Fig2_1", lambda content: made_up_cells("align_score", "lora_acc"), "metric_data"),
    ("Fig2_2", lambda content: made_up_cells("align_score", "metric_data", number=np.int64), "'i8'"),
    ("Fig2_2", lambda content: made_up_cells("align_score", "metric_data", number=lambda x: np.nan), "finite"),
    ("Fig1", lambda content: {s: c | {"Be": c["Be"][1:]} for s, c in content.items()}, "shorter"),
    ("Fig1", lambda content: {s: c | {"Be": [np.ones(3)] * 5} for s, c in content.items()}, "6 columns"),
    ("Fig1", lambda content: {s: c | {"Be": [np.ones((1, 2), ">f4")] * 5} for s, c in content.items()}, "'>'"),
]


def assert_refused(folder, name, named):
    with pytest.raises(UserError) as refused:
        main(Config(path=folder, output_dir=folder / "out"))
    assert str(folder / f"{name}.pkl") in str(refused.value) and named in str(refused.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("make_content", "named"), HOSTILE)
def test_hostile_file_is_refused_and_nothing_runs(make_content, named, tmp_path):
    marker = tmp_path / "marker"
    folder = write_files(tmp_path, Fig3=make_content(marker))
    assert_refused(folder, "Fig3", named)
    assert not marker.exists()
    if named != "numpy.dtype.__init__":  # in a plain unpickler it would run: else this test proves nothing
        pickle.loads((folder / "Fig3.pkl").read_bytes())  # noqa: S301, made just above
        assert marker.exists()


@pytest.mark.parametrize(("name", "change", "named"), DAMAGED)
def test_damaged_or_foreign_content_is_named(name, change, named, tmp_path):
    assert_refused(write_files(tmp_path, **{name: change(made_up_files()[f"{name}.pkl"])}), name, named)


def test_missing_ambiguous_and_wrong_paths_are_named(tmp_path):
    folder = write_files(tmp_path)
    found, second = folder / "Fig2_2.pkl", folder.parent / "Fig2_2.pkl"
    second.write_bytes(found.read_bytes())
    with pytest.raises(UserError, match=f"{second}, {found}"):
        main(Config(path=folder.parent))
    second.unlink()
    found.unlink()
    with pytest.raises(UserError, match=f"{folder.parent} must hold one Fig2_2.pkl, but holds none"):
        main(Config(path=folder.parent))
