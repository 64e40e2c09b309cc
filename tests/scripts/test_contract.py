"""Every script keeps one contract: it makes a result once, reuses it, refuses another, and makes it again if asked."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import alignment_vis
import cache
import from_scratch
import K_sweep
import linear_sklearn
import linear_training
import lora_finetuning
from tests.conftest import configure, retrain, run_in_process, write_rows
from utils.data.load import load_texts
from utils.results import read_identity
from utils.script import UserError
from utils.settings import Data, Run

WORDS = ("colour=red,green,house", "size=small,large,engine", "rest=the,of")
STEPS = {"num_steps": 2, "steps_per_evaluation": 2, "batch_size": 4, "dtype": "float32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A script with small settings."""

    module: ModuleType
    result: str  # pattern of its result
    work: str  # function of the script that a reused result does not need
    change: dict[str, Any]  # a setting that makes another result
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = (
    Case(cache, "moments/*/*/test.safetensors", "load_base_model", {"pooling": "last"}, {"split": "test"}),
    Case(K_sweep, "ntps/*/rows.json", "sweep_layer", {"num_null_draws": 3},
         {"num_null_draws": 2, "num_random_draws": 2, "picture": False}),
    Case(alignment_vis, "alignment/*/rows.layer0.json", "align", {"num_shuffles": 3},
         {"num_shuffles": 2, "words": WORDS}),
    Case(linear_sklearn, "linear_sklearn/*/rows.json", "probe_layers", {"inverse_penalty": 2.0},
         {"num_workers": 1, "picture": False}),
    Case(linear_training, "linear_training/*/rows/metrics.json", "find_states", {"learning_rate": 0.01},
         {"num_epochs": 2}),
    Case(lora_finetuning, "lora/*/rows/metrics.json", "build", {"rank": 4}, STEPS),
    Case(from_scratch, "from_scratch/*/rows/metrics.json", "build", {"learning_rate": 0.01}, STEPS),
)  # fmt: skip


@pytest.fixture(scope="module")
def moments(model_dirs, rows_path, tmp_path_factory) -> dict[str, Any]:
    """The settings of all cases, and the moments of the training rows from which some of them start."""
    shared = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "device": "cpu"}
    shared |= {"results_dir": tmp_path_factory.mktemp("moments")}
    cache.main(configure(cache, **shared))
    return shared


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.module.__name__)
def made(request, moments, tmp_path_factory) -> tuple[Case, dict[str, Any]]:
    """A case and the settings of its result, which is made once."""
    case, results = request.param, tmp_path_factory.mktemp("made") / "results"
    shutil.copytree(moments["results_dir"], results)
    settings = {**moments, "results_dir": results, **case.settings}
    case.module.main(configure(case.module, **settings))
    return case, settings


@pytest.fixture
def copied(made, tmp_path) -> tuple[Case, dict[str, Any], Path]:
    """The same with a copy of the results of its own, and the path of the result."""
    case, settings = made
    shutil.copytree(settings["results_dir"], tmp_path / "results")
    [path] = (tmp_path / "results").glob(case.result)
    return case, settings | {"results_dir": tmp_path / "results"}, path


def run(case: Case, settings: dict[str, Any], **more: Any) -> None:
    case.module.main(configure(case.module, **{**settings, **more}))


def forbid(monkeypatch, case: Case) -> None:
    """Makes it a mistake to begin the work."""
    monkeypatch.setattr(case.module, case.work, lambda *_, **__: pytest.fail("the work has begun"))


def test_a_result_is_made_with_its_provenance_and_nothing_half_written(copied):
    _, settings, path = copied
    content = read_identity(path)
    assert content["environment"]["packages"]["torch"] and content["config"]["seed"] == 0
    assert "results_dir" not in content["config"] and "device" not in content["config"]
    left = [file.name for file in settings["results_dir"].rglob("*") if file.suffix in (".tmp", ".lock", ".partial")]
    assert not left and not list(settings["results_dir"].rglob("*state*"))


@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: case.module.__name__)
def test_a_picture_that_cannot_be_drawn_loses_no_score(case, moments, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("No space left on device")

    shutil.copytree(moments["results_dir"], tmp_path / "results")
    settings = {**moments, **case.settings, "results_dir": tmp_path / "results"}
    monkeypatch.setattr(case.module, "save_figure", fail)
    with pytest.raises(OSError, match="No space"):
        run(case, settings, **({"picture": True} if "picture" in case.settings else {}))
    [path] = (tmp_path / "results").glob(case.result)
    assert read_identity(path)["config"]["seed"] == 0


def test_the_same_settings_reuse_it_also_from_a_copy_of_model_and_data(copied, monkeypatch, tmp_path):
    case, settings, path = copied
    before = path.read_bytes()
    forbid(monkeypatch, case)
    run(case, settings)
    shutil.copytree(settings["model_name"], tmp_path / "moved" / Path(settings["model_name"]).name)
    model, data = tmp_path / "moved" / Path(settings["model_name"]).name, tmp_path / "moved" / "rows.jsonl"
    shutil.copy(settings["dataset_name"], data)
    run(case, settings, model_name=str(model), dataset_name=str(data))
    assert path.read_bytes() == before


def test_another_setting_is_refused_by_its_name_and_made_with_overwrite(copied, monkeypatch):
    case, settings, path = copied
    [(name, value)] = case.change.items()
    before, stored = path.read_bytes(), read_identity(path)["config"][name]
    with monkeypatch.context() as patch:
        forbid(patch, case)
        with pytest.raises(UserError) as refused:
            run(case, settings, **case.change)
    message = str(refused.value)
    assert str(path) in message and f"{name}: {stored!r} there, {value!r} now" in message and "--overwrite" in message
    assert path.read_bytes() == before and message.count(" there, ") == 1
    run(case, settings, **case.change, overwrite=True)
    assert read_identity(path)["config"][name] == value


def test_overwrite_makes_it_again(copied, monkeypatch):
    case, settings, _ = copied
    forbid(monkeypatch, case)
    with pytest.raises(pytest.fail.Exception, match="the work has begun"):
        run(case, settings, overwrite=True)


def test_other_weights_under_the_same_name_are_refused(copied, monkeypatch, tmp_path):
    case, settings, path = copied
    before = path.read_bytes()
    folder = tmp_path / "other" / Path(settings["model_name"]).name
    shutil.copytree(settings["model_name"], folder)
    retrain(folder)
    forbid(monkeypatch, case)
    with pytest.raises(UserError, match="with other weights of the model"):
        run(case, settings, model_name=str(folder))
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["text", "label", "one test text"])
def test_changed_rows_under_the_same_name_are_refused(copied, monkeypatch, tmp_path, change):
    case, settings, path = copied
    if case.module in (K_sweep, alignment_vis):
        pytest.skip("the moments stand for the rows")
    rows = [json.loads(line) for line in Path(settings["dataset_name"]).read_text().splitlines()]
    if change == "one test text":
        test, texts = load_texts(Data(settings["dataset_name"]), Run(), "test"), [row["text"] for row in rows]
        number = next(texts.index(text) for text in test.texts if texts.count(text) == 1)
        rows[number]["text"] += " house"
    else:
        values = [row[change] for row in rows]
        rows = [row | {change: value} for row, value in zip(rows, values[1:] + values[:1], strict=True)]
    forbid(monkeypatch, case)
    before = path.read_bytes()
    with pytest.raises(UserError, match="from other rows"):
        run(case, settings, dataset_name=str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["a file", "a long name", "below a file", "a loop of links"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(made, kind, tmp_path, monkeypatch):
    case, settings = made
    if case.module in (K_sweep, alignment_vis):
        pytest.skip("without moments there is no work")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = {"a file": "file", "a long name": "x" * 300, "below a file": "file/below", "a loop of links": "loop"}
    monkeypatch.setattr("utils.models.load.load_weights", lambda *_, **__: pytest.fail("the work has begun"))
    options = ["--model_name", settings["model_name"], "--dataset_name", settings["dataset_name"]]
    message = run_in_process(
        monkeypatch, f"{case.module.__name__}.py", *options, "--results_dir", tmp_path / names[kind]
    )
    assert message.startswith("error: cannot write") and "--results_dir" in message and len(message) < 500
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module.__name__)
def test_what_no_setting_can_be_is_refused_by_the_command_line(case, monkeypatch, capsys):
    for flags, words in (
        (("--max_samples", "0"), "--max_samples must be at least 1, not 0"),
        (("--max_length", "-3"), "--max_length must be at least 1, not -3"),
        (("--seed", "-1"), "--seed must be from 0 to 4294967295, not -1"),
        (("--dtype", "int8"), "dtype"),
        (("--no_such_flag",), "no_such_flag"),
    ):
        assert run_in_process(monkeypatch, f"{case.module.__name__}.py", *flags) == 2
        assert words in " ".join(capsys.readouterr().err.split())
